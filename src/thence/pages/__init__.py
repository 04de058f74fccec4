"""What people read: an HTML page a run, evaluation, comparison or audit, and the same tables in a terminal.

A kind of page is a folder: ``page.py`` collects what it says, ``page.html`` extends ``base.html``. ``template`` holds
the one Jinja environment, ``base.html`` the one style sheet, ``parts.html`` what pages share. ``figure`` draws,
``table`` is a table as plain data, ``terminal`` prints it.
"""
