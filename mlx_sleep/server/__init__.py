"""An HTTP server over sessions: OpenAI's chat completions, a memory for each user, a page.

wire.py          OpenAI's requests, replies and errors, as data
conversation.py  which of a client's messages a session has heard already
sessions.py      many sessions over one model; the least used are put away on the disk
engine.py        the thread that runs the model: replies in turn, sleep when nothing is asked
guard.py         who may ask: the API key, the Host header, the Origin header
app.py           the routes
run.py           the socket, the signals, uvicorn

Only engine.py's thread touches a session.
"""
