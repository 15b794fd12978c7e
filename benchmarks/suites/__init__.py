"""The suites: each builds its subjects, describes its measures, and leaves the rounds to the harness."""
