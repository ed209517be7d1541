"""Keeps this machine's paths from visitors, who see another name for the folder of uploads."""

import json
import os

TEXT = (b"text/html", b"application/json", b"text/event-stream")  # answers that name files


class PathsHidden:
    """Renames the folder of uploads to `/uploads` in responses, and back in requests.

    The two names are equally long, so that responses keep their length.
    """

    def __init__(self, app, folder):
        self.app, self.folder = app, os.path.abspath(folder)
        length = len(os.fsencode(self.folder))
        self.name = "/uploads".ljust(length, "_")[:length]

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if f"file={self.name}/" in scope["path"]:
            scope = scope | {"path": scope["path"].replace(self.name, self.folder, 1)}
        if headers.get(b"content-type", b"").startswith(b"application/json"):
            receive = self._read(receive)
        await self.app(scope, receive, self._written(send))

    def _read(self, receive):
        """Return a `receive` whose body has this machine's paths."""
        done = False

        async def read():
            nonlocal done
            if done:
                return await receive()
            body, message = b"", {"more_body": True}
            while message.get("more_body"):
                message = await receive()
                body += message.get("body", b"")
            done = True
            return message if message["type"] != "http.request" else message | {"body": self._renamed(body)}

        return read

    def _renamed(self, body):
        """Return a JSON body with this machine's paths; a body that is not JSON is left for others to refuse."""
        if self.name.encode() not in body:
            return body
        try:
            return json.dumps(json.loads(body, object_hook=self._file)).encode()
        except ValueError:
            return body

    def _file(self, values):
        path = values.get("path")
        if isinstance(path, str) and path.startswith(f"{self.name}/"):
            values["path"] = self.folder + path[len(self.name) :]
        return values

    def _written(self, send):
        """Return a `send` that names files as visitors see them."""
        text = False

        async def write(message):
            nonlocal text
            if message["type"] == "http.response.start":
                text = dict(message["headers"]).get(b"content-type", b"").startswith(TEXT)
            elif text and message.get("body"):
                body = message["body"].replace(os.fsencode(self.folder), self.name.encode())
                message = message | {"body": body}
            await send(message)

        return write
