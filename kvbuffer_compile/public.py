"""What the public names of the package are, imported when the first of them is asked for (`__init__.py`)."""

from kvbuffer_compile.backend import kvbuffer as kvbuffer
from kvbuffer_compile.errors import Declined as Declined
from kvbuffer_compile.errors import DeclinedError as DeclinedError
from kvbuffer_compile.errors import EmitError as EmitError
from kvbuffer_compile.errors import IRError as IRError
from kvbuffer_compile.errors import OptionError as OptionError
from kvbuffer_compile.errors import StateError as StateError
from kvbuffer_compile.explanation import explain as explain
from kvbuffer_compile.options import Options as Options
from kvbuffer_compile.report.report import Report as Report
from kvbuffer_compile.report.state import StateReport as StateReport
from kvbuffer_compile.runtime.by_hand import materialize as materialize
from kvbuffer_compile.runtime.by_hand import rollback as rollback
from kvbuffer_compile.runtime.drafts import accept as accept
from kvbuffer_compile.runtime.drafts import draft_tree as draft_tree
from kvbuffer_compile.runtime.entry import keep_out as _keep_out
from kvbuffer_compile.runtime.slots import read_slots as read_slots
from kvbuffer_compile.runtime.slots import write_slots as write_slots
from kvbuffer_compile.runtime.stats import StateStats as StateStats
from kvbuffer_compile.runtime.stats import Stats as Stats
from kvbuffer_compile.runtime.stats import stats as stats

_keep_out(accept, explain, materialize, read_slots, rollback, stats, write_slots)
