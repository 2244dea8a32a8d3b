"""The server, asked as any program asks OpenAI's: tell it, let it sleep, ask again.

python examples/serve_and_ask.py      # needs: pip install 'mlx-sleep[serve]'
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="embedded", help="as of `mlx-sleep serve`")
model = parser.parse_args().model


def ask(path, body=None):
    """The JSON that the server answers."""
    request = urllib.request.Request(f"{url}{path}", body and json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def say(text):
    messages = [{"role": "user", "content": text}]
    reply = ask("/v1/chat/completions", {"model": name, "messages": messages, "user": "anna"})
    print(f"> {text}\n{reply['choices'][0]['message']['content']}")


with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
url = f"http://127.0.0.1:{port}"
with tempfile.TemporaryDirectory() as home:
    command = [sys.executable, "-m", "mlx_sleep", "serve", "--model", model]
    server = subprocess.Popen([*command, "--port", str(port), "--home", home])
    try:
        while True:
            try:
                name = ask("/v1/models")["data"][0]["id"]
                break
            except OSError:
                if server.poll() is not None:
                    sys.exit(1)  # it has said why
                time.sleep(0.2)
        say("My dog is called Baruno.")
        slept = ask("/v1/memories/anna/sleep", {})["slept"]
        print(f"(slept: {slept['tokens']} tokens, {slept['passes']} passes)")
        say("What is my dog called?")
    finally:
        server.terminate()
        server.wait()
