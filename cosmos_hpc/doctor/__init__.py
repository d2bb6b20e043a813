"""Everything that would fail later, found in a minute: one small function for each check, and a probe job.

`examine` looks at an experiment file; `submit` has the quick part of it done before anything is sent.
"""

from cosmos_hpc.doctor.examination import examine, quick_findings
from cosmos_hpc.doctor.finding import Finding, Verdict

__all__ = ["Finding", "Verdict", "examine", "quick_findings"]
