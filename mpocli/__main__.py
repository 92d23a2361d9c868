"""`python -m mpocli`."""

from mpocli.cli.app import main

if __name__ == "__main__":
    main()
