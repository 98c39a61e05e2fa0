"""The loss inside other libraries: a file for each, which imports its library and nothing else imports."""
