"""Networks taken apart and put together by address."""
