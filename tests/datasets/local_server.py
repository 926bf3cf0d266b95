"""A server on this machine for tests of downloads."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """A localhost server whose faults a test can set.

    Attributes:
        files: content by path.
        ranges: the Range header of every request, None where there was none.
        cut_after: close each of the first connections after that many body bytes.
        with_ranges: answer Range requests with 206; else with the whole file.
    """

    def __init__(self):
        self.files = {}
        self.ranges = []
        self.cut_after = []
        self.with_ranges = True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self._http.server_port}'
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request):
        wanted = request.headers.get('Range')
        self.ranges.append(wanted)
        content = self.files.get(request.path)
        if content is None:
            request.send_error(404)
            return
        start = 0
        if wanted and self.with_ranges:
            start = int(wanted.removeprefix('bytes=').removesuffix('-'))
            request.send_response(206)
            request.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        else:
            request.send_response(200)
        body = content[start:]
        request.send_header('Content-Length', str(len(body)))
        request.end_headers()
        request.wfile.write(body[: self.cut_after.pop(0)] if self.cut_after else body)

    def close(self):
        self._http.shutdown()
        self._http.server_close()
