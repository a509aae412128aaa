"""What must hold whatever breaks: for each property its tests, its long form, and switches, each of
which takes one of its protections away."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Switch:
    """An edit of the code after which `test` must fail."""

    file: str
    """Below `r3mes_vllm`."""
    before: str
    after: str
    test: str


@dataclass(frozen=True)
class Property:
    number: int
    name: str
    tests: tuple[str, ...]
    """The short forms, as pytest names them; a file stands for all that is in it."""
    switches: tuple[Switch, ...]
    long: str = ""
    """The command of the long form."""


PROPERTIES = (
    Property(
        1,
        "SIGTERM under streaming load loses no stream",
        (
            "tests/test_lifecycle.py::test_sigterm_loses_none_of_a_thousand_streams",
            "tests/node/test_drain.py",
        ),
        (
            Switch(
                *("node/drain.py", "asyncio.wait(waits, timeout=self._timeout,"),
                "asyncio.wait(waits, timeout=0,",
                "tests/test_lifecycle.py::test_sigterm_loses_none_of_a_thousand_streams",
            ),
        ),
    ),
    Property(
        2,
        "a node killed before its first token: another answers",
        (
            "tests/backend/test_chaos.py::test_killed_nodes_are_not_noticed",
            "tests/test_killed_nodes.py",
        ),
        (
            Switch(
                *("backend/dial.py", "in enumerate(nodes):", "in enumerate(nodes[:1]):"),
                "tests/backend/test_chaos.py::test_killed_nodes_are_not_noticed",
            ),
        ),
        "make chaos",
    ),
    Property(
        3,
        "a node killed in mid-stream: another goes on, token for token, or the answer is an error",
        (
            "tests/backend/test_chaos.py",
            "tests/test_killed_nodes.py",
            "tests/node/test_carrying.py",
            "tests/backend/test_moving.py",
        ),
        (
            Switch(
                *("backend/proxy.py", "_MOST_NODES = 8\n", "_MOST_NODES = 1\n"),
                "tests/backend/test_chaos.py::test_killed_nodes_are_not_noticed",
            ),
            Switch(  # each that breaks off then ends as an error, and none needs to
                *("backend/proxy.py", "_MOST_NODES = 8\n", "_MOST_NODES = 1\n"),
                "tests/backend/test_chaos.py::test_what_looks_complete_is",
            ),
            Switch(
                "backend/proxy.py",
                'await client.send(b"\\n\\n" * course.is_within_event + _BROKEN)',
                'await client.send(b"data: [DONE]\\n\\n")',
                "tests/backend/test_chaos.py::test_killed_nodes_are_not_noticed",
            ),
        ),
        "make chaos",
    ),
    Property(
        4,
        "one failed dial, or a minute without a beat, takes a node out",
        (
            "tests/backend/test_routing.py::test_a_node_that_failed_its_dial_is_out_until_its_next_beat",
            "tests/backend/test_network.py::test_a_node_without_a_beat_for_60_seconds_drops_out",
        ),
        (
            Switch(
                *("backend/dial.py", "self._dial_failed(node)\n", "pass\n"),
                "tests/backend/test_routing.py::test_a_node_that_failed_its_dial_is_out_until_its_next_beat",
            ),
            Switch(
                *("backend/view.py", "it.status == wire.ACTIVE and it.last_heartbeat > oldest"),
                "it.status == wire.ACTIVE",
                "tests/backend/test_network.py::test_a_node_without_a_beat_for_60_seconds_drops_out",
            ),
        ),
    ),
    Property(
        5,
        "after a restart of the backend, or a partition, all nodes are back within two beats",
        (
            "tests/backend/test_routers.py::test_after_a_restart_all_nodes_are_back_within_two_beats",
            "tests/node/test_serving.py::TestBackendAway::test_a_backend_that_forgot_the_node_has_it_back_within_two_beats",
            "tests/node/test_heartbeat.py::test_a_backend_that_forgot_it_gets_a_registration",
            "tests/node/test_heartbeat.py::test_a_partition_of_minutes_is_over_within_two_beats",
            "tests/backend/test_outages.py",
            "tests/backend/test_routing.py::test_after_a_partition_all_nodes_get_their_share_at_once",
        ),
        (
            Switch(
                *("node/heartbeat.py", "min(delay * 2, self._interval)", "delay * 2"),
                "tests/node/test_heartbeat.py::test_a_partition_of_minutes_is_over_within_two_beats",
            ),
            Switch(
                "node/heartbeat.py",
                "min(refused.retry_after / (1 - _JITTER), self._interval)",
                "refused.retry_after",
                "tests/node/test_heartbeat.py::test_a_partition_of_minutes_is_over_within_two_beats",
            ),
        ),
    ),
    Property(
        6,
        "a routed node holds exactly the CID",
        ("tests/backend/test_chaos.py::test_what_looks_complete_is",),
        (
            Switch(
                "backend/balancer.py",
                'sure = [n for n in listing if canonical(n.adapters.get(name, "")) == wanted]',
                "sure = [*listing]",
                "tests/backend/test_chaos.py::test_what_looks_complete_is",
            ),
            Switch(
                "backend/course.py",
                "if cid and listed and canonical(cid) != canonical(listed):",
                "if False:",
                "tests/backend/test_chaos.py::test_what_looks_complete_is",
            ),
        ),
        "make chaos",
    ),
    Property(
        7,
        "an answer in any batch is the answer alone",
        (
            "tests/engine/test_isolation.py",
            "tests/node/test_serving.py::test_in_a_mixed_batch_each_gets_what_it_gets_alone",
        ),
        (
            Switch(
                "engine/plugin.py",
                "type(current_platform).get_punica_wrapper = classmethod(lambda cls: CPU_WRAPPER)",
                "pass",
                "tests/node/test_serving.py::test_in_a_mixed_batch_each_gets_what_it_gets_alone",
            ),
        ),
        "make isolation REQUESTS=10000",
    ),
    Property(
        8,
        "no hostile adapter reaches the engine",
        (
            "tests/adapters/test_vetting.py",
            "tests/adapters/test_files.py",
            "tests/engine/test_vetting_agrees.py",
            "tests/ipfs/test_trees.py",
            "tests/ipfs/test_archive.py",
            "tests/fuzz/test_fuzz.py",
        ),
        (
            Switch(
                *("adapters/vetting.py", "if largest == math.inf:", "if False:"),
                "tests/adapters/test_vetting.py::test_bad_weights_are_refused_by_their_rule_alone",
            ),
            Switch(
                "adapters/vetting.py",
                "if (a.shape[1], b.shape[0]) != it.base.modules[module]:",
                "if False:",
                "tests/adapters/test_vetting.py::test_bad_weights_are_refused_by_their_rule_alone",
            ),
            Switch(
                *("adapters/vetting.py", "if not _LITERAL.fullmatch(name):", "if False:"),
                "tests/adapters/test_vetting.py::test_a_bad_configuration_is_refused",
            ),
            Switch(
                *("adapters/vetting.py", 'if "auto_map" in found:', "if False:"),
                "tests/adapters/test_vetting.py::test_a_tokenizer_with_code_is_refused",
            ),
            Switch(
                *("adapters/files.py", "if expected != size:", "if False:"),
                "tests/adapters/test_files.py::test_a_broken_weights_file_is_refused",
            ),
        ),
        "make fuzz",
    ),
    Property(
        9,
        "no request is a failure of the node",
        ("tests/conformance/test_schema.py", "tests/node/test_mistakes.py"),
        (
            Switch(
                *("node/app.py", "app.add_middleware(Mistakes)\n", "pass\n"),
                "tests/conformance/test_schema.py::test_no_mistake_of_a_client_is_a_failure_of_the_node",
            ),
        ),
        "make conformance",
    ),
    Property(
        10,
        "an engine that hangs, dies or is poisoned is noticed, and started again with its adapters",
        ("tests/node/test_restart.py",),
        (
            Switch(
                *("engine/canary.py", "                if not answered:\n"),
                "                if False:\n",
                "tests/node/test_restart.py::test_a_stopped_engine",
            ),
        ),
    ),
    Property(
        11,
        "forgery, replay, foreign and private addresses, rebinding, redirects, web pages: refused",
        (
            "tests/backend/test_endpoints.py",
            "tests/backend/test_signatures.py",
            "tests/backend/test_proofs.py",
            "tests/backend/test_reach.py",
            "tests/backend/test_origins.py",
            "tests/node/test_guard.py",
            "tests/test_cross_site.py",
        ),
        (
            Switch(
                *("backend/endpoints.py", "if not is_public(address):\n", "if False:\n"),
                "tests/backend/test_endpoints.py::test_a_name_that_turns_private_after_its_registration_is_not_dialled",
            ),
            Switch(
                *("backend/signed.py", "if not signatures.is_signed(claim.key, signature, text):"),
                "if False:",
                "tests/backend/test_signatures.py::test_a_signature_is_of_the_body_and_the_path",
            ),
            Switch(
                "backend/claims.py",
                "return and_(_NODES.c.public_key == claim.key.hex(), is_later(claim))",
                "return _NODES.c.public_key == claim.key.hex()",
                "tests/backend/test_signatures.py::test_a_request_is_taken_once",
            ),
            Switch(
                *("backend/signed.py", "if abs(late) > TOLERANCE_S:", "if False:"),
                "tests/backend/test_signatures.py::test_a_request_of_another_time_is_refused",
            ),
            Switch(
                *("backend/app.py", "app.add_middleware(KeepOut,", "dict("),
                "tests/backend/test_origins.py::test_what_a_page_sends_without_asking_first_changes_nothing",
            ),
            Switch(
                "node/guard.py",
                "caller.key is None and (error := self._pages.objection(scope))",
                "error := None",
                "tests/node/test_guard.py::test_a_web_page_commands_no_node_that_asks_for_no_key",
            ),
            Switch(
                *("cross_site.py", "if self._known is not None and", "if False and"),
                "tests/node/test_guard.py::test_a_name_that_was_led_to_loopback_opens_no_door",
            ),
        ),
    ),
    Property(
        12,
        "slow senders and endless bodies cost nobody else",
        (
            "tests/node/test_limits.py",
            "tests/node/test_early.py",
            "tests/test_bounded_http.py",
            "tests/backend/test_slow_senders.py",
        ),
        (
            Switch(
                *("node/limits.py", "async with asyncio.timeout(self._seconds):"),
                "async with asyncio.timeout(None):",
                "tests/node/test_limits.py::test_a_slow_sender_is_cut_off_while_others_are_served",
            ),
            Switch(
                "backend/server.py",
                "http=bounded_http.bounded(settings.header_bytes, settings.header_timeout),",
                "",
                "tests/backend/test_slow_senders.py::test_a_head_without_an_end_is_refused",
            ),
            Switch(
                *("backend/bodies.py", "async with asyncio.timeout(room.seconds):"),
                "async with asyncio.timeout(None):",
                "tests/backend/test_slow_senders.py::test_a_request_that_does_not_come_is_cut_off_while_others_are_served",
            ),
            Switch(
                *("backend/bodies.py", "if more > room.left:", "if False:"),
                "tests/backend/test_slow_senders.py::test_bodies_that_stop_in_the_middle_fill_no_more_than_their_room",
            ),
        ),
        "make bench-front-door",
    ),
    Property(
        13,
        "from slow, lying and vanished sources, onto a full or read-only disk: no adapter in part",
        (
            "tests/ipfs/test_fetch.py",
            "tests/ipfs/test_failing.py",
            "tests/adapters/test_full_disk.py",
            "tests/adapters/test_read_only.py",
            "tests/adapters/test_room.py",
            "tests/adapters/test_store.py",
            "tests/node/test_cut_off.py",
        ),
        (
            Switch(
                "ipfs/cid.py",
                "return _HASHES[self.hash_code][1](data) == self.digest",
                "return True",
                "tests/ipfs/test_fetch.py::test_a_liar_is_named_and_nothing_of_it_is_kept",
            ),
            Switch(
                *("ipfs/tree.py", "_require_room(place.path, node.size)", "pass"),
                "tests/adapters/test_full_disk.py::test_what_does_not_fit_is_refused_with_its_size_before_it_takes_the_room",
            ),
            Switch(
                "adapters/store.py",
                "return os.open(path, os.O_RDONLY | os.O_CLOEXEC)",
                "raise",
                "tests/adapters/test_read_only.py::test_what_is_in_it_is_served_and_nothing_is_touched",
            ),
        ),
        "make crash",
    ),
    Property(
        14,
        "a client that leaves frees the engine within a second",
        (
            "tests/node/test_serving.py::TestChat::test_a_client_that_leaves_frees_the_engine",
            "tests/backend/test_streaming.py::test_a_client_that_leaves_mid_stream_ends_the_nodes_stream",
            "tests/backend/test_streaming.py::test_a_client_that_leaves_before_the_first_byte_ends_the_nodes_work",
        ),
        (
            Switch(
                "disconnect.py",
                "await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)",
                "await asyncio.wait({working})",
                "tests/backend/test_streaming.py::test_a_client_that_leaves_before_the_first_byte_ends_the_nodes_work",
            ),
            Switch(
                "node/chat.py",
                "await while_connected(receive, self._send(scope, receive, send))",
                "await self._send(scope, receive, send)",
                "tests/node/test_serving.py::TestChat::test_a_client_that_leaves_frees_the_engine",
            ),
        ),
    ),
    Property(
        15,
        "loads, unloads and traffic leave no memory behind",
        ("tests/node/test_hosting.py::test_loading_and_unloading_leaves_no_memory_behind",),
        (
            Switch(
                "engine/host.py",
                "asyncio.wait_for(self._engine.remove_lora(version.lora_id), REMOVE_TIMEOUT_S)",
                "asyncio.sleep(0)",
                "tests/node/test_hosting.py::test_loading_and_unloading_leaves_no_memory_behind",
            ),
        ),
        "make churn",
    ),
    Property(
        16,
        "what is asked and answered, and keys, are in no log, metric or error",
        (
            "tests/test_discretion.py",
            "tests/backend/test_observed.py",
            "tests/node/test_observed.py::test_nothing_that_was_said_is_in_any_log",
            "tests/node/test_observed.py::test_nothing_that_was_said_is_shown",
        ),
        (
            Switch(
                *("discretion.py", "    if not _kept:\n", "    if False:\n"),
                "tests/node/test_observed.py::test_nothing_that_was_said_is_in_any_log",
            ),
        ),
    ),
    Property(
        17,
        "all killed at once, at any instant: registry and store are whole, and a restart serves",
        (
            "tests/resilience/test_power_cut.py",
            "tests/adapters/test_store.py::test_what_a_power_cut_damaged_is_dropped_and_fetched_again",
            "tests/adapters/test_power_cut.py",
            "tests/backend/test_slow_senders.py::test_what_is_acknowledged_is_on_the_disk",
        ),
        (
            Switch(
                *("backend/database.py", "PRAGMA synchronous=FULL", "PRAGMA synchronous=NORMAL"),
                "tests/backend/test_slow_senders.py::test_what_is_acknowledged_is_on_the_disk",
            ),
            Switch(
                "adapters/manifest.py",
                "return bool(manifest.get(_BOOT, boot_id()) != boot_id())",
                "return False",
                "tests/adapters/test_store.py::test_what_a_power_cut_damaged_is_dropped_and_fetched_again",
            ),
            Switch(
                *("backend/writing.py", "engine.begin()", "engine.connect()"),  # no commit
                "tests/resilience/test_power_cut.py",
            ),
        ),
        "make power-cut",
    ),
    Property(
        18,
        "clocks that jump, names that don't resolve, a taken port, a second start: a clear message",
        (
            "tests/test_state_dir.py",
            "tests/cli/test_cli.py::test_a_taken_port_is_said_at_once",
            "tests/backend/test_server.py::test_a_port_in_use_is_a_sentence",
            "tests/backend/test_signatures.py::test_clocks_may_differ_by_a_minute",
            "tests/backend/test_signatures.py::test_a_clock_that_is_set_back_keeps_no_node_out",
            "tests/node/test_signing.py::test_a_process_begins_anew_where_its_clock_is_set_back",
            "tests/backend/test_endpoints.py::test_a_host_that_does_not_resolve_is_the_clients_mistake",
            "tests/node/test_names.py",
        ),
        (
            Switch(
                *("backend/claims.py", ", _NODES.c.boot >= not_yet(claim))", ")"),
                "tests/backend/test_signatures.py::test_a_clock_that_is_set_back_keeps_no_node_out",
            ),
            Switch(
                *(
                    "node/signer.py",
                    "if now < self._began - TOLERANCE_S or self._began < self._latest:",
                ),
                "if False:",
                "tests/node/test_signing.py::test_a_process_begins_anew_where_its_clock_is_set_back",
            ),
            Switch(
                "state_dir.py",
                "fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)",
                "pass",
                "tests/test_state_dir.py::test_two_nodes_can_not_use_it_and_a_killed_one_does_not",
            ),
        ),
    ),
)
