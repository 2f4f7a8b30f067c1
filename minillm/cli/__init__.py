"""The command line: `process` is where it begins, `parser` what it takes, `commands` what it does."""
