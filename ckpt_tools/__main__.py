"""`ckpt`, and `python -m ckpt_tools`."""


def main() -> None:
    """Run the command line; a signal that comes while it is imported ends the process at once."""
    try:
        import signal

        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Python's, which shows what it was doing
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    from .cli import main as run

    run()


if __name__ == "__main__":
    main()
