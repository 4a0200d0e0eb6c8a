"""The command line: options, what is wrong with them, and which job runs."""
