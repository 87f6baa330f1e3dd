"""A real stream from installed packages, played against the whole daemon, with a table at its end."""
