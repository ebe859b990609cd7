import click
command=click.Command("export")
