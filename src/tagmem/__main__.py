"""`python -m tagmem`: the command line where its script is not on the path (from a checkout, from
tests).
"""

from tagmem.cli.main import main

if __name__ == "__main__":
    main()
