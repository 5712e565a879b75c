"""Makes the page of an export, which hears in the browser by onnxruntime-web, without a server.

The page is that of tools/live.py with web.js behind it, which takes the place of the server.
"""

import base64
import hashlib
import io
import tarfile
from pathlib import Path

from cli import UserError

from files import cannot_read, json_text, read_small
from stream import SILENCE_AFTER_TEXT

PACKAGE = "onnxruntime-web-1.30.0.tgz"  # as `npm pack` names it
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# The build for one thread on the CPU, which works on any server and any browser.
RUNTIME = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
# For the README of the export.
NAMES = {
    "package": PACKAGE.removesuffix(".tgz").replace("-web-", "-web@"),
    "package_file": PACKAGE,
    "runtime": " ".join(f"package/dist/{name}" for name in RUNTIME),
}
FOLDER = Path(__file__).parent


def page(sizes: dict) -> str:
    """Makes index.html for a streaming graph of these sizes, by the names that web.js uses."""
    live = (FOLDER / "live.html").read_text(encoding="utf-8")
    ear = (FOLDER / "web.js").read_text(encoding="utf-8")
    body, end = live.rsplit("</html>", 1)
    values = {"SIZES": sizes, "RUNTIME": RUNTIME, "PAUSE": SILENCE_AFTER_TEXT}
    lines = "".join(f"const {name} = {json_text(value)};\n" for name, value in values.items())
    return f"{body}<script>\n{lines}{ear}</script>\n</html>{end}"


def runtime(path: str) -> dict[str, bytes]:
    """Takes from PACKAGE, which lies at `path`, the files that the page loads, by their names.

    Raises UserError where the file cannot be read, or is another package.
    """
    try:
        package = read_small(path, 2**28)
    except (OSError, ValueError) as error:
        raise cannot_read(path, error, f"name {PACKAGE}, which make web gets") from error
    if base64.b64encode(hashlib.sha512(package).digest()).decode() != SHA512:
        raise UserError(
            f"{path} is not {PACKAGE}, or is damaged; name that file, or, where make web got this "
            "one, remove it and repeat the command"
        )
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        return {name: archive.extractfile(f"package/dist/{name}").read() for name in RUNTIME}
