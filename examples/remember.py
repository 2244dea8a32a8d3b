"""The library in 20 lines: tell, sleep, ask, leave, come back, ask again.

python examples/remember.py
"""

import tempfile

from mlx_sleep.session import Session

with tempfile.TemporaryDirectory() as home:
    with Session.open(memory="demo", home=home) as session:
        print(session.tell("My name is Zorvik."))
        print(session.tell("My dog is called Baruno."))
        report = session.sleep()
        print(
            f"slept over {report.tokens} tokens, {report.passes} passes; "
            f"{session.stats().kv_bytes} bytes of KV cache left"
        )
        print(session.ask("What is my dog called?"))

    with Session.open(memory="demo", home=home) as session:  # another day
        print(session.ask("What is my name?"))
