"""The applications that run in the lab; each is a program that knows nothing of the mesh."""
