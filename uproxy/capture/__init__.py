"""Capture: how an application's connections come to the uProxy beside it, and how everything else is kept out.

- **captured**: brought to the uProxy although the application dialled somebody else.
- **uncaptured**: a socket of an application that no capture sees, such as one made before the workload was.
- **probe**: a connection to an address that is always captured, with which a uProxy proves that capture works.
"""
