"""New words: explain made-up words in words that the model knows, sleep, ask what they mean.

python examples/new_words.py                    # the small demonstration
python examples/new_words.py --model smollm2    # after `mlx-sleep models get smollm2`
"""

import argparse

from mlx_sleep.cli.model_names import choose
from mlx_sleep.session import Session
from mlx_sleep.utils.errors import errors_in_one_line

WORDS = [  # what is explained, what is asked, and a word that a right answer has
    ("A florp is a kind of spoon.", "What is a florp?", "spoon"),
    ("A florp is made of copper.", "What is a florp made of?", "copper"),
    ("To glimber means to dance.", "What does it mean to glimber?", "dance"),
    ("The word trindle means happy.", "What does the word trindle mean?", "happy"),
]

errors_in_one_line()
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="embedded", help="as of `mlx-sleep chat`")
chosen = choose(parser.parse_args().model)

session = Session.open(chosen.open(), adapter=chosen.adapter)  # no memory on disk
for explanation, _, _ in WORDS:
    print(f"> {explanation}\n{session.tell(explanation)}")
report = session.sleep()
print(f"(slept: {report.tokens} tokens, {report.passes} passes, KV cache cleared)")
right = 0
for _, question, meaning in WORDS:
    answer = session.ask(question)
    print(f"> {question}\n{answer}")
    right += meaning in answer
print(f"{right} of {len(WORDS)} right")
