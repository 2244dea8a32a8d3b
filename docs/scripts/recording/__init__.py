"""Records a program at a terminal and draws the recording as an animated SVG.

typist.py types a script at a pseudo-terminal, cast.py keeps what came, screen.py says what was on
the screen when, svg.py draws that. None of them knows what is recorded.
"""
