"""The backend with every log on: `python -m tests.backend.talkative backend ...`."""

import logging

from r3mes_vllm.cli.main import main

if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG)
    main()
