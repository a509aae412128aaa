"""Run by the `python` of the environment that tests/packaging/requirements.txt describes.

`tools.py compose FILE`: exit 1 and the reason if it is not what the Compose specification says.
`tools.py promql`: expressions as a JSON list on the input → for each the metrics in it.
`tools.py schema SCHEMA`: a JSON list of documents on the input, each against the JSON schema file.
"""

import json
import sys
from pathlib import Path
from typing import Any


def compose(file: str) -> None:
    from compose_spec import PyCompose  # type: ignore[import-not-found]

    found = PyCompose.from_yaml(Path(file).read_text())
    found.validate()
    found.validate_networks()
    found.validate_secrets()
    found.validate_volumes()


def promql() -> None:
    import promql_parser  # type: ignore[import-not-found]

    def metrics(node: Any) -> set[str]:
        found = {node.name} if isinstance(node, promql_parser.VectorSelector) else set()
        for part in ("expr", "lhs", "rhs", "param", "vector_selector"):
            if (inner := getattr(node, part, None)) is not None:
                found |= metrics(inner)
        for inner in getattr(node, "args", None) or ():
            found |= metrics(inner)
        return found

    print(json.dumps([sorted(metrics(promql_parser.parse(it))) for it in json.load(sys.stdin)]))


def schema(file: str) -> None:
    import jsonschema  # type: ignore[import-untyped]

    known = json.loads(Path(file).read_text())
    for document in json.load(sys.stdin):
        jsonschema.validate(document, known[f"{document['apiVersion']} {document['kind']}"])


if __name__ == "__main__":
    if sys.argv[1] == "promql":
        promql()
    else:
        {"compose": compose, "schema": schema}[sys.argv[1]](sys.argv[2])
