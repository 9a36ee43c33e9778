"""A DSPy program over a served ensemble, whose fields are guided.

Needs: pip install dspy, and a server: rc-agents serve package:demo
"""

import os
import sys
from typing import Literal

import dspy
from dspy.utils.exceptions import LMError

URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
KEY = os.environ.get("OPENAI_API_KEY", "none")


class ServedLM(dspy.LM):
    """A model of our server, which follows schemas; DSPy's own table does not list it."""

    supports_response_schema = True
    supported_params = frozenset({"response_format"})


class Code(dspy.Signature):
    """Say which illness an ICD-10-CM code stands for."""

    code: str = dspy.InputField()
    title: Literal["Plague", "Influenza", "Measles"] = dspy.OutputField()


def main() -> None:
    """Asks one question and prints the field."""
    lm = ServedLM("openai/rc", api_base=URL, api_key=KEY, max_tokens=64, cache=False)
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        print(dspy.Predict(Code)(code="A20").title)


if __name__ == "__main__":
    try:
        main()
    except LMError as error:
        sys.exit(f"{URL}: {error}; is it served? rc-agents serve package:demo")
