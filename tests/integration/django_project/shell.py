"""What a user does in the project's shell; prints what comes of it as JSON."""

from __future__ import annotations

import json
import threading

import django

import tests.integration.django_project  # its app names Django's settings

django.setup()

from django.db import transaction  # noqa: E402  after the setup, as Django wants it

from tests.integration.django_project.tasks import greet, once, single  # noqa: E402

assert tests.integration.django_project.app.conf.task_time_limit == 30
found: list[object] = []
with transaction.atomic():
    greet.delay_on_commit("committed")
with transaction.atomic():
    greet.delay_on_commit("rolled back")
    transaction.set_rollback(True)
found.append(greet.delay("main").get(timeout=60))
thread = threading.Thread(target=lambda: found.append(greet.delay("thread").get(timeout=60)))
thread.start()
thread.join()
for task in (once, single):
    first, second = task.delay(1.0), task.delay(1.0)
    is_one = second.state == "REJECTED" or second.id == first.id
    found += [is_one, first.get(timeout=60), task.delay(0.0).get(timeout=60)]
print(json.dumps(found))
