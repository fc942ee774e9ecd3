"""`python -m pyfasa` is the `pyfasa` command."""

from pyfasa.cli import main

if __name__ == "__main__":
    main()
