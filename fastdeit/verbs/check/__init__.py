"""`fastdeit data check`: every sample looked at (`samples`), what is found (`report`), and a page of it (`page`)."""
