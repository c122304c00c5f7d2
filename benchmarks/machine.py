"""The machine that results were measured on, and writing results."""

import json


def machine(*packages):
    """The processor, the system and the versions of packages, for a JSON file of results."""
    # Imported here and below: each process of step.py first chooses a backend and a checkout of the package.
    from keras_mmfnet._machine import machine

    return machine(*packages)


def report(result, path):
    """Prints a result and writes it to a JSON file."""
    from keras_mmfnet._files import write

    text = json.dumps(result, indent=2)
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, text + "\n")
