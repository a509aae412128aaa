"""The page on the protocol says what the code does, to the byte."""

import re
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from r3mes_vllm import signatures
from r3mes_vllm.identity import Identity

PAGE = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()
BLOCKS = [
    re.sub(r"^ {4}", "", block, flags=re.MULTILINE).strip("\n")
    for block in re.findall(r"^ {4}.*\n(?:\n*^ {4}.*\n)*", PAGE, re.MULTILINE)
]


def identity() -> Identity:
    seed = re.search(r"private key is the 32 bytes `([0-9a-f ]+)…([0-9a-f]+)`", PAGE)
    assert seed
    assert (seed[1], seed[2]) == ("00 01 02 ", "1f")
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))


def block(beginning: str) -> str:
    (found,) = (it for it in BLOCKS if it.startswith(beginning))
    return found


def test_the_worked_request_is_what_the_code_makes() -> None:
    head, _, body = block("POST /api").partition("\n\n")
    lines = [line.partition(": ") for line in head.splitlines()[1:]]
    headers = {name: value for name, _, value in lines}
    found = signatures.from_headers(headers)
    assert found
    claim, signature = found
    path = head.split(" ")[1]
    text = signatures.request_text(claim, "POST", path, body.encode())
    assert text.decode() == block("r3mes-request-v1")
    who = identity()
    assert claim.key == who.public_key
    assert who.sign(text) == signature
    assert signatures.is_signed(claim.key, signature, text)
    assert signatures.to_headers(claim, signature).items() <= headers.items()
    assert f"`{who.wallet_address}`" in PAGE


def test_the_worked_proof_is_what_the_code_makes() -> None:
    text = block("r3mes-endpoint-v1")
    _, nonce, url = text.splitlines()
    assert signatures.endpoint_text(nonce, url).decode() == text
    signature = re.search(r'"signature": "([0-9a-f]+)"', block('{"key"'))
    assert signature
    assert identity().sign(text.encode()).hex() == signature[1]
    assert identity().public_key.hex() in block('{"key"')
    assert f'"nonce": "{nonce}"' in PAGE


def test_the_page_names_every_header_and_the_tolerance() -> None:
    for name in signatures.to_headers(signatures.Claim(bytes(32), 1, "0" * 32, 1), bytes(64)):
        assert f"| `{name}` |" in PAGE
    assert f"{signatures.TOLERANCE_S} s" in PAGE
