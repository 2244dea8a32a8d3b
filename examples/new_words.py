"""New words: explain made-up words in words that the model knows, sleep, ask what they mean.

python examples/new_words.py
"""

from mlx_sleep.session import Session

WORDS = [
    ("A florp is a kind of spoon.", "What is a florp?"),
    ("A florp is made of copper.", "What is a florp made of?"),
    ("To glimber means to dance.", "What does it mean to glimber?"),
    ("The word trindle means happy.", "What does trindle mean?"),
]

session = Session.open()  # no memory on disk
for explanation, _ in WORDS:
    print(f"> {explanation}\n{session.tell(explanation)}")
report = session.sleep()
print(f"(slept: {report.tokens} tokens, {report.passes} passes, KV cache cleared)")
for _, question in WORDS:
    print(f"> {question}\n{session.ask(question)}")
