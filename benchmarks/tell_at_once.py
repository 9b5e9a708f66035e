"""A pytest plugin that prints failures when they happen: of a run that is ended, the summary at its end never comes."""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Print by pytest's own writer, which no captured output goes through."""
    writer = config.get_terminal_writer()

    class Teller:
        @pytest.hookimpl(trylast=True)
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                writer.line()
                writer.line(report.longreprtext)

    config.pluginmanager.register(Teller())
