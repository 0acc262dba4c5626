"""`abkd explore`: a page for learning the alpha-beta plane, served to this machine alone.

`rows` and `toys` hold teachers and students, `effects` and `landing` the numbers, `sentences` the words, `server` and
`page.html` what the browser sees. The page draws; it computes nothing.
"""

from abkd.explore.rows import Row, rows_of
from abkd.explore.server import make_server, serve

__all__ = ["Row", "make_server", "rows_of", "serve"]
