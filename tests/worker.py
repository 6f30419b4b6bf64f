"""The program of other processes; launchers start a file again, which a module in a test's process cannot be."""

from toy import main

if __name__ == "__main__":
    main()
