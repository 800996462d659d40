"""`fastdeit doctor`."""

import argparse

from fastdeit.cli.parser import Verb


def _doctor(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.verbs import doctor

    doctor.main(args)


DOCTOR = Verb(
    "doctor", "what this machine offers, and which kernels will be used", "", _doctor, examples=["fastdeit doctor"]
)

VERBS = (DOCTOR,)
