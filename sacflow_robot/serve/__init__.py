"""Policy files, the wire format, the server and its client. Never imports torch."""
