"""`python -m dylora_stream` is the command line."""

from dylora_stream.cli import main

if __name__ == "__main__":
    main()
