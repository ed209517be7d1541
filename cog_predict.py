"""Serve captioners through cog, in a container or on this machine without Docker.

    cog run -i image=@photo.jpg -i use_beam_search=true
    python cog_predict.py --port 5000

The second runs cog's own HTTP server here. It answers `POST /predictions` with a body like
`{"input": {"image": "https://... or data:...", "model": "coco", "use_beam_search": false}}`.
In a container, the environment variables CLIPCAP_CHECKPOINT and CLIPCAP_DTYPE take the place of the flags.
"""

import importlib.util
import inspect
import os
import sys

from features.images import ImageError
from models.captioner_files import check_export_dtype, is_export
from models.pretrained import NAMES, repository_of
from utils.cli import VERSION, Parser, late_imports, note, positive_int, run
from utils.files import write_json
from utils.flags import DTYPES, add_dtype_flag

if importlib.util.find_spec("cog") is None:
    note('error: cog_predict.py needs cog; run: pip install -e ".[serve]"')
    sys.exit(2)
# cog's builder reads this file without running it: it wants its names imported here and choices written out
from cog import BaseRunner, Input, Path  # noqa: E402

CHECKPOINT, DTYPE = "CLIPCAP_CHECKPOINT", "CLIPCAP_DTYPE"
OWN = "own"  # the model that CLIPCAP_CHECKPOINT names
TYPES = {Path: {"type": "string", "format": "uri"}, str: {"type": "string"}, bool: {"type": "boolean"}}
FOLDER = os.path.dirname(os.path.abspath(__file__))
SCHEMA = os.path.join(FOLDER, ".cog", "openapi_schema.json")  # where cog's server looks for it


class Predictor(BaseRunner):
    """Captions one image, with the inputs of the predecessor's class of this name."""

    def setup(self) -> None:
        """Name the captioners; each is loaded when it is first asked for, but the server's own at once.

        Raises: ValueError for variables that are wrong; as `Captioner`.
        """
        own, dtype = os.environ.get(CHECKPOINT), os.environ.get(DTYPE)
        check_own(own, dtype)
        with late_imports():
            from models.predictor import Predictor as Captioners
        self.predictor = Captioners()
        self.predictor.setup({name: name for name in NAMES} | ({OWN: own} if own else {}), dtype=dtype)
        if own:
            self.predictor.captioner(OWN)

    def run(
        self,
        image: Path = Input(description="Input image"),  # noqa: B008
        model: str = Input(  # noqa: B008
            default="coco",
            choices=["coco", "conceptual", "conceptual-captions", "coco-transformer", "demo", "own"],
            description="Model to use; demo needs no download, knows a synthetic world; own is the server's own",
        ),
        use_beam_search: bool = Input(  # noqa: B008
            default=False, description="Whether to apply beam search to generate the output text"
        ),
    ) -> str:
        """Return the caption of one image.

        Raises: ValueError with what a visitor may know: no paths of this machine.
        """
        if not isinstance(image, Path):  # cog hands over its own copy as a Path; other text names a file of the server
            raise ValueError("image must be an address (https://...) or the data of an image (data:...)")
        try:
            return self.predictor.predict(str(image), model, use_beam_search)
        except ImageError as error:
            raise ValueError(str(error).removeprefix(f"{image}: ")) from None
        except (ValueError, OSError) as error:
            raise ValueError(f"the model {model} cannot be loaded on this server: choose another") from error


def check_own(checkpoint, dtype):
    """Refuse a captioner or dtype that does not exist; raises ValueError, FileNotFoundError."""
    if dtype and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    if checkpoint and not os.path.exists(checkpoint) and not repository_of(checkpoint):
        raise FileNotFoundError(f"--checkpoint {checkpoint} is neither a file nor a folder, nor ORG/NAME of the hub")
    if checkpoint and is_export(checkpoint):
        check_export_dtype(checkpoint, dtype)


def openapi():
    """Return what cog's server checks requests against, as `cog build` would write it."""
    properties, schemas = {}, {}
    for order, (name, parameter) in enumerate(list(inspect.signature(Predictor.run).parameters.items())[1:]):
        field = parameter.default
        properties[name] = {"x-order": order, "description": field.description}
        if field.choices:
            schemas[name] = {"title": name, "enum": field.choices, **TYPES[parameter.annotation]}
            properties[name]["allOf"] = [{"$ref": f"#/components/schemas/{name}"}]
        else:
            properties[name] |= {"title": name.replace("_", " ").capitalize(), **TYPES[parameter.annotation]}
        if field.default is not None:
            properties[name]["default"] = field.default
    required = [name for name, field in properties.items() if "default" not in field]
    schemas["Input"] = {"title": "Input", "type": "object", "properties": properties, "required": required}
    schemas["Output"] = {"title": "Output", "type": "string"}
    request = {"type": "object", "properties": {"input": {"$ref": "#/components/schemas/Input"}}}
    answer = {"type": "object", "properties": {"output": {"$ref": "#/components/schemas/Output"}}}
    content = {"application/json": {"schema": request}}, {"application/json": {"schema": answer}}
    predictions = {"requestBody": {"content": content[0]}, "responses": {"200": {"content": content[1]}}}
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": VERSION},
        "paths": {"/predictions": {"post": predictions}},
        "components": {"schemas": schemas},
    }


def get_parser():
    """Return the command line's parser."""
    parser = Parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on; 0.0.0.0 serves the whole network")
    parser.add_argument("--port", type=positive_int, default=5000, help="port")
    parser.add_argument(
        "--checkpoint", metavar="FILE",
        help="a captioner of yours, the model `own`: a file, a folder that export.py wrote, or ORG/NAME of the "
        "Hugging Face Hub",
    )  # fmt: skip
    add_dtype_flag(parser)
    return parser


def main(argv=None):
    """Become cog's HTTP server for this file."""
    args = get_parser().parse_args(argv)
    check_own(args.checkpoint, args.dtype)
    write_json(SCHEMA, openapi())
    own = args.checkpoint and os.path.exists(args.checkpoint)
    given = {CHECKPOINT: os.path.abspath(args.checkpoint) if own else args.checkpoint, DTYPE: args.dtype}
    os.chdir(FOLDER)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    environment = {"COG_PREDICT_TYPE_STUB": "cog_predict.py:Predictor", "PORT": str(args.port), "PATH": path}
    environment |= {name: value for name, value in given.items() if value}
    os.execve(
        sys.executable,
        [sys.executable, "-m", "cog.server.http", "--host", args.host],
        {**os.environ, **environment},
    )


if __name__ == "__main__":
    run(main)
