"""Other proxies as real processes: what uProxy is measured against, and what it is tested with."""
