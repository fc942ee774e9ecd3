"""The `pyfasa` command, also as `python -m pyfasa`."""


def main() -> None:
    """The console script. Ctrl-C before or after a command runs ends quietly, with exit code 130.

    Python itself may end by the signal instead, which is 130 to shells too.
    """
    try:
        from pyfasa.cli import main as command  # some tenths of a second, in which Ctrl-C may come

        command()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
