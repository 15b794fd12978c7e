"""The instrument: what is measured, how rounds are taken, and what may be said about them afterwards."""
