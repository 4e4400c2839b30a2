"""`python -m rankfold.cli`."""

from rankfold.cli import main

if __name__ == "__main__":
    main()
