"""Command-line flags, with our way of refusing wrong ones."""

import argparse

from lra.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a UserError, so that they end as one message and exit status 2."""

    def error(self, message: str):
        raise UserError(f"{message}; {self.prog} --help shows what is allowed")
