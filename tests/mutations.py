"""Switches mechanisms off, one at a time, and checks that a test then fails.

    python tests/mutations.py                        all of them, about half an hour on 2 cores
    python tests/mutations.py --only lock --page docs/mutations.md

Each mutation is a text that stands exactly once in a file, and its replacement in a copy of the tree. The exit code is
1 if no test notices a mutation, or if its text no longer stands in the file.
"""

import argparse
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from reliability import ROOT, commit, machine

TOGETHER = 2  # trees that are worked on at a time
COPIED = (
    "*.py",
    "omni",
    "scripts",
    "benchmarks",
    "tests",
    "configs",
    "pyproject.toml",
    "README.md",
    "Makefile",
    ".gitignore",
)


@dataclass(frozen=True)
class Mutation:
    promise: str
    what: str  # effect of the mutation
    file: str
    old: str
    new: str
    tests: str  # pytest's arguments


RESUME = "tests/test_resume.py::test_resume_is_exact_with_partial_steps_and_bf16[text]"
SAVES = "tests/test_checkpoint.py"
VOICES = "tests/test_voices.py"
PITCH = "tests/test_excitation.py"
COUNTS = "tests/test_gpu_counts.py"
MUTATIONS = [
    Mutation(
        "exact resume", "a resumed epoch begins at its first sample", "omni/train/loop.py",
        "dataset.skip_samples = progress.step * dataset.samples_per_step",
        "dataset.skip_samples = progress.step // dataset.steps_per_epoch * dataset.steps_per_epoch"
        " * dataset.samples_per_step",
        "tests/test_resume.py::test_kills_at_boundaries -k 'text and three'",
    ),
    Mutation(
        "exact resume", "random states are not restored", "omni/train/resume.py",
        'set_rng_state(payload["rng"][run.rank], run.device)', "pass", RESUME,
    ),
    Mutation(
        "exact resume", "the optimizer is not restored", "omni/train/resume.py",
        'load_optimizer(phase.optimizer, saved["optimizer"], path)', "pass", RESUME,
    ),
    Mutation(
        "exact resume", "running averages are not restored", "omni/train/resume.py",
        'training.meter.load_state_dict(payload["meter"][run.rank])', "pass", RESUME,
    ),
    Mutation(
        "boundaries", "a validation that was killed is not taken up again", "omni/train/loop.py",
        "self.save_and_validate()  # repeats a validation that was interrupted", "pass",
        "tests/test_signals.py::test_a_signal_saves_and_stops -k text",
    ),
    Mutation(
        "num_workers may change", "workers get the micro-batches the other way round", "omni/data/order.py",
        "(worker.id, worker.num_workers)", "(worker.num_workers - 1 - worker.id, worker.num_workers)",
        "tests/test_resume.py::test_another_num_workers_between_runs_changes_nothing[text]",
    ),
    Mutation(
        "O(1) resume", "what is skipped is read", "omni/data/order.py",
        "for micro_batch in range(start + index, stop, count):\n            rows = self.rows(epoch, micro_batch)\n",
        "for micro_batch in range(index, stop, count):\n            rows = self.rows(epoch, micro_batch)\n"
        "            if micro_batch < start:\n                self.source.batch(rows, epoch)\n"
        "                continue\n",
        "tests/test_data.py::test_a_resumed_run_reads_no_skipped_row",
    ),
    Mutation(
        "each sample once an epoch", "every epoch has the order of the first", "omni/data/order.py",
        "self.seed * 0x1_0000_0000 + epoch", "self.seed * 0x1_0000_0000",
        "tests/test_resume.py::test_every_sample_once_per_epoch_in_another_order[text]",
    ),
    Mutation(
        "each sample once an epoch", "rows are drawn, not permuted", "omni/data/order.py",
        "rows = permute(positions, len(self.source), key)\n",
        "rows = np.random.default_rng(key).integers(0, len(self.source), len(positions))\n",
        "tests/test_resume.py::test_every_sample_once_per_epoch_in_another_order[text]",
    ),
    Mutation(
        "atomic save", "written in place", "omni/common/files.py",
        'with open(temporary, "xb") as file:', 'with open(path, "wb") as file:',
        f"{SAVES}::test_a_failed_write_leaves_the_old_file_and_no_temporary",
    ),
    Mutation(
        "atomic save", "the folder is not synced after the rename", "omni/common/files.py",
        "fsync(path.parent)  # the rename itself must survive a power cut", "pass",
        f"{SAVES}::test_an_older_checkpoint_goes_only_when_the_new_one_is_safely_on_disk[text]",
    ),
    Mutation(
        "atomic save", "leftovers of a killed save stay", "omni/common/lock.py",
        "        remove_temporary(folder)\n", "",
        "tests/test_signals.py::test_a_partial_file_of_a_killed_save_is_cleared",
    ),
    Mutation(
        "disk full", "what was written so far stays", "omni/common/files.py",
        "temporary.unlink(missing_ok=True)\n            temporary_in_progress = None",
        "temporary_in_progress = None",
        f"{SAVES}::test_disk_full_during_a_save[text]",
    ),
    Mutation(
        "corruption", "the checksum is not compared", "omni/train/checkpoint.py",
        "if comment != _TAG + digest.hexdigest().encode():", "if False:",
        f"{SAVES}::test_every_flipped_bit_is_detected {SAVES}::test_every_damage_to_a_step_file_is_detected[text]",
    ),
    Mutation(
        "corruption", "with all checkpoints damaged, it starts over", "omni/train/checkpoint.py",
        'damaged = sorted(folder.glob(f"{prefix}_step_*.pt{DAMAGED_SUFFIX}"))', "damaged = []",
        f"{SAVES}::test_all_checkpoints_damaged_stops_the_run_every_time[text]",
    ),
    Mutation(
        "retention", "the best is deleted like the others", "omni/train/checkpoint.py",
        "if step != best_step:", "if True:",
        f"{SAVES}::test_the_best_checkpoint_is_kept_and_becomes_the_final_file[text]",
    ),
    Mutation(
        "retention", "an older file goes before the new one is there", "omni/train/resume.py",
        "            checkpoint.save(path, payload)\n            checkpoint.prune(",
        "            (lambda folder, prefix, keep, best: checkpoint.prune(folder, prefix, keep - 1, best)"
        " or checkpoint.save(path, payload))(",
        f"{SAVES}::test_a_new_file_that_does_not_verify_costs_no_older_one[text]"
        f" {SAVES}::test_an_older_checkpoint_goes_only_when_the_new_one_is_safely_on_disk[text]",
    ),
    Mutation(
        "retention", "step 10 comes before step 9, as names do", "omni/train/checkpoint.py",
        "for match, path in matches if match), reverse=True)",
        "for match, path in matches if match), key=lambda found: str(found[0]), reverse=True)",
        f"{SAVES}::test_order_and_retention_are_numeric",
    ),
    Mutation(
        "environment", "the newest checkpoint is that with the latest file time", "omni/train/checkpoint.py",
        "for match, path in matches if match), reverse=True)",
        "for match, path in matches if match), key=lambda found: found[1].stat().st_mtime, reverse=True)",
        "tests/test_environment.py::test_file_times_do_not_decide_which_checkpoint_is_newest",
    ),
    Mutation(
        "environment", "a run with a fault in a data worker waits for its workers", "omni/train/cli.py",
        "workers = multiprocessing.active_children()", "workers = []",
        "tests/test_environment.py::test_a_fault_in_a_data_worker_ends_the_run_with_its_traceback"
        " -k 'audio_enc and KeyError' --timeout 60",
    ),
    Mutation(
        "no code in checkpoints", "torch.load may run what it finds", "omni/train/checkpoint.py",
        'map_location="cpu", weights_only=True', 'map_location="cpu", weights_' + "only=bool(0)",
        f"{SAVES}::test_a_pickle_with_code_is_refused_even_with_a_valid_checksum",
    ),
    Mutation(
        "signals", "a request to stop is not looked at", "omni/train/loop.py",
        "if run.stop_agreed(None in micro_batches):", "if False:",
        "tests/test_signals.py::test_a_signal_saves_and_stops -k text",
    ),
    Mutation(
        "environment", "loader workers run out of open files", "omni/train/run.py",
        "            raise_open_file_limit()\n", "            pass\n",
        "tests/test_signals.py -k 'few_open_files_for_workers and text'",
    ),
    Mutation(
        "signals", "a second signal leaves what is being written", "omni/train/run.py",
        "files.temporary_in_progress.unlink(missing_ok=True)", "pass",
        "tests/test_signals.py::test_a_second_signal_leaves_no_partial_file -k text",
    ),
    Mutation(
        "environment", "a recording that vanishes in mid-run ends it with a traceback", "omni/train/cli.py",
        "except BadRow as error:", "except ZeroDivisionError as error:", "tests/test_talker.py -k vanish",
    ),
    Mutation(
        "signals", "a signal to a stopped run that is ending kills it", "omni/train/run.py",
        "signal.SIG_IGN if stopped else handler", "handler",
        "tests/test_signals.py::test_signals_while_a_stopped_run_ends_change_nothing -k text",
    ),
    Mutation(
        "lock", "workers outlive a killed run", "omni/data/order.py",
        "    if os.getppid() != trainer:\n        os._exit(1)\n", "    pass\n",
        "tests/test_signals.py::test_no_worker_outlives_a_killed_run -k 'text and fork'",
    ),
    Mutation(
        "lock", "no lock is taken", "omni/common/lock.py",
        "fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
        "tests/test_signals.py::test_a_second_process_on_the_same_folder_stops_and_names_the_first",
    ),
    Mutation(
        "lock", "workers inherit the lock", "omni/common/lock.py",
        "fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "tests/test_files.py -k a_folder_is_free",
    ),
    Mutation(
        "config config_diff", "another training's checkpoint is taken", "omni/train/resume.py",
        "    if changes:\n", "    if False:\n",
        "tests/test_config.py::test_another_training_is_refused_with_the_differences -k text",
    ),
    Mutation(
        "config config_diff", "other data are taken for the same", "omni/train/resume.py",
        "if now.get(key) != value}", "if False}",
        "tests/test_config.py::test_changed_data_are_refused -k text",
    ),
    Mutation(
        "bad rows", "they are not counted", "omni/train/report.py",
        'self.new_bad_rows |= batch.get("bad_rows", {})', "pass",
        "tests/test_bad_rows.py::test_bad_rows_are_named_replaced_and_counted -k audio_enc",
    ),
    Mutation(
        "bad rows", "any number of them is put up with", "omni/train/report.py",
        "        if len(known) > limit:\n", "        if False:\n",
        "tests/test_bad_rows.py::test_too_many_bad_rows_stop_the_run -k audio_enc",
    ),
    Mutation(
        "loss not finite", "the update is made all the same", "omni/train/loop.py",
        "optimizer.found_inf = 1.0 - made", "optimizer.found_inf = 0.0 * made",
        "tests/test_environment.py::test_a_loss_that_is_not_finite_makes_no_update_and_is_counted -k text",
    ),
    Mutation(
        "loss not finite", "any number in a row is put up with", "omni/train/report.py",
        "if in_a_row >= limit:", "if False:", "tests/test_environment.py::test_many_in_a_row_stop_the_run",
    ),
    Mutation(
        "validation", "it leaves its mark in the random states", "omni/train/validation.py",
        "        untouched_rng(run.device),\n", "",
        "tests/test_resume.py::test_validation_changes_nothing_in_training[text]",
    ),
    Mutation(
        "the running mean of the weights", "the last weights are judged", "omni/train/validation.py",
        "        nullcontext() if phase.average is None else phase.average.in_place(),\n", "",
        "tests/test_average.py -k judged_and_kept",
    ),
    Mutation(
        "the running mean of the weights", "it stays in the model after a validation", "omni/train/average.py",
        "            self._write(own)", "            pass", "tests/test_average.py -k changes_nothing",
    ),
    Mutation(
        "the running mean of the weights", "a resumed run begins it anew", "omni/train/resume.py",
        '    phase.average.load(saved.get("average"), path)\n        training', "    pass\n        training",
        "tests/test_average.py -k killed",
    ),
    Mutation(
        "the running mean of the weights", "the last step's is kept under the best step's number",
        "omni/train/resume.py",
        'phase.average.load(saved.get("average"), path)\n        return', "pass\n        return",
        "tests/test_average.py -k mean_of_the_best_step_is_kept",
    ),
    Mutation(
        "the running mean of the weights", "a training is opened with its last weights", "omni/train/checkpoint.py",
        ' = phase["module"] | mean', ' = phase["module"]', "tests/test_average.py -k opened",
    ),
    Mutation(
        "the running mean of the weights", "a damaged one of the best step is a traceback", "omni/train/resume.py",
        "        with checkpoint.understood(path):\n            saved = best",
        "        if True:\n            saved = best",
        "tests/test_average.py -k damaged_mean_of_the_best",
    ),
    Mutation(
        "the running mean of the weights", "it keeps a part of the first weights", "omni/train/average.py",
        "(1 - self.decay) / (1 - self.decay**steps)", "1 - self.decay", "tests/test_average.py -k weighted_mean",
    ),
    Mutation(
        "the running mean of the weights", "the last weights are kept", "omni/train/resume.py",
        "            average.install()", "            pass", "tests/test_average.py -k judged_and_kept",
    ),
    Mutation(
        "progress", "the bar of a resumed run begins at 0", "omni/train/loop.py",
        "run.logs.start_bar(training.total_steps, progress.step)", "run.logs.start_bar(training.total_steps, 0)",
        "tests/test_resume.py::test_progress_of_a_resumed_run[text]",
    ),
    Mutation(
        "interchange", "a missing weight is passed over", "omni/train/checkpoint.py",
        "module.load_state_dict(state_dict, assign=assign)", "module.load_state_dict(state_dict, strict=False)",
        "tests/test_distributed.py::test_a_missing_or_extra_weight_is_an_error[text]",
    ),
    Mutation(
        "a finished run", "it is trained and written again", "omni/train/loop.py",
        "if progress.step >= training.total_steps and (metrics := run.from_main(self.checkpoints.finished_metrics)):",
        "if progress.step >= training.total_steps and (metrics := None):",
        "tests/test_environment.py::test_a_finished_run_rerun_changes_no_file -k text",
    ),
    Mutation(
        "torchrun", "both processes read the same rows", "omni/data/order.py",
        "first = (part * self.world + self.rank) * self.batch_size", "first = part * self.world * self.batch_size",
        "tests/test_distributed.py::test_two_processes_agree_with_one[text]",
    ),
    Mutation(
        "torchrun", "the gradient is half of what it should be", "omni/train/loop.py",
        "(loss * (share * world)).backward()", "(loss * share).backward()",
        "tests/test_distributed.py::test_two_processes_agree_with_one[text]",
    ),
    Mutation(
        "torchrun", "only the process that got the signal stops", "omni/train/processes.py",
        "return bool(self._all_reduce(torch.tensor(int(flag)), dist.ReduceOp.MAX)) if", "return flag if",
        "tests/test_distributed.py::test_a_signal_to_one_of_two_stops_both[text] --timeout 60",
    ),
    Mutation(
        "bad config", "unknown keys are passed over", "omni/train/config.py",
        'model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())',
        'model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, protected_namespaces=())',
        "tests/test_config.py::test_bad_keys -k text",
    ),
    Mutation(
        "hostile input", "a path may leave image_root", "omni/data/named_files.py",
        "if root is not None and not path.resolve().is_relative_to(folder.resolve()):", "if False:",
        "tests/test_manifest.py::test_files_inside_and_outside_of_the_root",
    ),
    Mutation(
        "hostile input", "a NUL byte in a CSV is passed over", "omni/data/records.py",
        'if (nul := chunk.find(b"\\0")) >= 0:', "if (nul := -1) >= 0:",
        "tests/test_manifest.py::test_a_bad_csv_is_refused_in_one_line",
    ),
    Mutation(
        "hostile input", "a line of any length is read", "omni/data/records.py",
        "if len(self.held) > MAX_ROW_BYTES:", "if False:",
        "tests/test_manifest.py::test_a_line_of_100_mb_is_refused_in_bounded_memory",
    ),
    Mutation(
        "hostile input", "a recording of any length is read", "omni/data/audio.py",
        "if most is not None and resampled_length(samples, rate, to_rate) > most:", "if False:",
        "tests/test_audio.py::test_what_cannot_be_used_is_refused_with_its_reason"
        " tests/test_audio.py::test_ten_hours_and_a_thousand_channels_cost_no_memory",
    ),
    Mutation(
        "hostile input", "a picture of any size is decoded", "omni/data/images.py",
        "        check_size(source, picture.width, picture.height, MAX_PIXELS)\n", "        pass\n",
        "tests/test_images.py::test_an_image_bomb_is_refused_from_its_header",
    ),
    # manifests and texts
    Mutation(
        "no row vanishes", "a quotation mark opens a field wherever it stands", "omni/data/records.py",
        """re.compile(rb'(?<![^%s\\r\\n])"' % mark.encode())""", """re.compile(b'"')""",
        "tests/test_rows.py::test_a_stray_quotation_mark_at_any_place_loses_no_row",
    ),
    Mutation(
        "no row vanishes", "a quotation mark that is never closed takes the rest of the file", "omni/data/records.py",
        "if in_quotes and not quote_seen:", "if False:",
        "tests/test_rows.py::test_a_stray_quotation_mark_at_any_place_loses_no_row",
    ),
    Mutation(
        "no row vanishes", "a CR at the end of a chunk is forgotten", "omni/data/records.py",
        'pending = previous == b"\\r" and not in_quotes', "pending = False",
        "tests/test_rows.py::test_the_rows_of_any_text_are_those_of_the_csv_module",
    ),
    Mutation(
        "no row vanishes", "a row that a CR cuts in two is used", "omni/data/manifest.py",
        "self.format.check(record.data, functools.partial(self._following, row))", "pass",
        "tests/test_rows.py::test_a_carriage_return_inside_a_row_makes_it_bad_and_one_between_rows_does_not",
    ),
    Mutation(
        "no row vanishes", "two stray marks may make one row of many", "omni/data/formats/csv_rows.py",
        "self._reader(text, strict=over_lines)", "self._reader(text)",
        "tests/test_rows.py::test_two_stray_marks_make_a_row_that_is_named",
    ),
    Mutation(
        "no row vanishes", "the counts of a manifest's rows need not add up", "omni/data/manifest.py",
        "assert np.array_equal(np.sort(found), np.arange(len(manifest))), ", "assert True, ",
        "tests/test_rows.py::test_every_row_is_in_one_count",
    ),
    Mutation(
        "no row vanishes", "text after a JSON array is not looked at", "omni/data/records.py",
        "if closed and chunk[done:].strip(_JSON_BLANKS):", "if False:",
        "tests/test_rows.py::test_what_is_no_json_array_is_refused_in_one_line",
    ),
    Mutation(
        "no row vanishes", "an element that is no JSON is a bad row of the array", "omni/data/formats/json_rows.py",
        'if isinstance(error.__cause__, json.JSONDecodeError):', "if False:",
        "tests/test_rows.py::test_what_is_no_json_array_is_refused_in_one_line",
    ),
    Mutation(
        "no row vanishes", "a text file's byte-order mark is text", "omni/data/lines.py",
        "start = len(codecs.BOM_UTF8)", "start = 0",
        "tests/test_corpus.py::test_lines_end_as_on_any_system_and_begin_after_a_bom",
    ),
    Mutation(
        "no row vanishes", "a text with CR only is cut inside a line", "omni/data/lines.py",
        "len(chunk) - end if end and file.peek(1) else _incomplete_character(chunk)", "_incomplete_character(chunk)",
        "tests/test_corpus.py::test_lines_end_as_on_any_system_and_begin_after_a_bom",
    ),
    Mutation(
        "no row vanishes", "where one text ends and the next begins, a token is read twice", "omni/data/corpus.py",
        "np.cumsum([len(part) - 1 for part in parts])", "np.cumsum([len(part) for part in parts]) - 1",
        "tests/test_text.py::test_several_files_train_as_their_concatenation_also_after_a_kill",
    ),
    Mutation(
        "caches", "texts of the same name share their tokens in cache_dir", "omni/data/corpus.py",
        "facts.append(str(path.resolve()))", "pass",
        "tests/test_corpus.py::test_of_several_files_only_the_changed_one_is_tokenised_again",
    ),
    Mutation(
        "bad config", "a folder is taken for a text", "omni/data/text_rows.py",
        "if folder := next((path for path in paths if path.is_dir()), None):", "if folder := None:",
        "tests/test_text.py::test_names_of_texts_that_cannot_be_used_are_one_line",
    ),
    Mutation(
        "any exception is the row's", "only expected exceptions are", "omni/common/errors.py",
        "if error is None or isinstance(error, _PASSED_ON):",
        "if not isinstance(error, OSError) or isinstance(error, _PASSED_ON):",
        "tests/test_rows.py::test_any_exception_of_a_reader_is_the_rows",
    ),
    Mutation(
        "any exception is the row's", "that a batch is not waited for is a row's fault", "omni/common/errors.py",
        "_PASSED_ON = (BadRow, Interrupted, GivenUp,", "_PASSED_ON = (BadRow, Interrupted,",
        "tests/test_rows.py -k wait_no_longer",
    ),
    Mutation(
        "names of files", "only the name as it is written is looked for", "omni/data/named_files.py",
        "return list(dict.fromkeys([name, plain, *forms]))", "return [name]",
        "tests/test_rows.py::test_names_are_found_as_other_systems_write_them",
    ),
    Mutation(
        "names of files", "a name in another spelling may leave the root", "omni/data/named_files.py",
        "if root is not None and not path.resolve().is_relative_to(folder.resolve()):", "if False:",
        "tests/test_rows.py::test_no_spelling_of_a_name_leaves_the_root",
    ),
    Mutation(
        "index", "an index is rewritten without its lock", "omni/data/index.py",
        "with contextlib.suppress(UserError), hold_cache(folder, log, check_stop):", "with contextlib.nullcontext():",
        "tests/test_rows.py::test_an_index_in_a_folder_that_cannot_be_written",
    ),
    Mutation(
        "index", "a damaged array is used", "omni/data/index.py",
        "if hashlib.sha256(data[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:].tobytes():", "if False:",
        "tests/test_rows.py::test_a_damaged_index_is_made_again_with_a_line",
    ),
    Mutation(
        "bad config", "a config's byte-order mark is not left away", "omni/train/config.py",
        '.lstrip("\\ufeff")', "", "tests/test_config.py::test_a_byte_order_mark_is_no_part_of_a_config",
    ),
    Mutation(
        "bad config", "a vocabulary may have any size", "omni/models/architectures.py",
        'vocab_size: int = Field(8192, ge=272, le=1_048_576, description="upper bound; a', 
        'vocab_size: int = Field(8192, ge=272, description="upper bound; a',
        "tests/test_config.py::test_no_size_is_without_an_upper_bound",
    ),
    # conversations and captions
    Mutation(
        "rows never vanish", "no question has an answer", "omni/stages/tasks/recordings.py",
        "return answer is not None and bool(str(answer).strip())", "return answer == 7",
        "tests/test_sft.py::test_the_same_rows_are_the_same_samples_in_every_format",
    ),
    Mutation(
        "nothing is learnt without its file", "a picture without a tag is left lying", "omni/data/conversations.py",
        "beside.give_out_what_is_left(messages)", "pass",
        "tests/test_conversations.py -k nothing_is_learnt",
    ),
    Mutation(
        "nothing is learnt without its file", "line breaks around a tag stay", "omni/data/conversations.py",
        r"""(image|audio|video))>\n?")""", '(image|audio|video))>")',
        "tests/test_conversations.py -k same_conversation",
    ),
    Mutation(
        "rows never vanish", "rows longer than the context stay, to be bad in training", "omni/stages/tasks/prepare.py",
        "return manifest.leave_out(rows, room == NOTHING, reason,", "return (lambda *_: rows)(rows, room, reason,",
        "tests/test_sft.py::test_rows_that_are_too_long_are_left_out_at_the_start_in_every_task",
    ),
    Mutation(
        "rows never vanish", "a wording that is too long makes its row bad", "omni/stages/tasks/base.py",
        "return self._read(row, self.messages(row, None))", "raise",
        "tests/test_sft.py::test_a_wording_that_does_not_fit_gives_way_to_the_first",
    ),
    Mutation(
        "rows never vanish", "a file that no task uses is not accounted for", "omni/stages/tasks/prepare.py",
        "account_for_tasks(run, opened, tasks)", "account_for_tasks(run, [], tasks)",
        "tests/test_measures.py -k no_task_uses",
    ),
    Mutation(
        "rows never vanish", "pictures with questions alone are to be described", "omni/stages/tasks/pictures.py",
        "return bool(captions_of(fields)) or not (", "return True or (",
        "tests/test_measures.py -k pictures_need_a_caption",
    ),
    Mutation(
        "rows never vanish", "rows without caption and questions are not named", "omni/stages/tasks/pictures.py",
        'return bool(captions_of(fields)) or not (fields.get("questions") and question_pairs(fields))',
        "return bool(captions_of(fields))",
        "tests/test_bad_rows.py::test_bad_rows_are_named_replaced_and_counted[omni]",
    ),
    Mutation(
        "rows never vanish", "texts without an alignment loss are not counted", "omni/stages/tasks/recordings.py",
        "count_unaligned(side, manifest, rows)\n        return", "pass\n        return",
        "tests/test_sft.py -k too_long_for_the_alignment_loss",
    ),
    # measures of stage E
    Mutation(
        "fair scores", "each item counts in the accuracy, not each task", "omni/stages/tasks/mixture.py",
        'metrics["accuracy"] = sum(scores.values()) / len(scores)',
        'metrics["accuracy"] = sum(v for k, v in totals.items() if k.endswith("earned")) '
        '/ sum(v for k, v in totals.items() if k.endswith("possible"))',
        "tests/test_measures.py -k each_task_counts_once",
    ),
    Mutation(
        "fair scores", "each recording counts in the word error rate, not each word", "omni/stages/tasks/measures.py",
        "return Points(length - missed - found.insertions, length)",
        "return Points((length - missed - found.insertions) / length)",
        "tests/test_measures.py -k each_task_counts_once",
    ),
    Mutation(
        "fair scores", "a score may be less than 0", "omni/stages/tasks/measures.py",
        "return min(1.0, max(0.0, self.earned / self.possible))", "return min(1.0, self.earned / self.possible)",
        "tests/test_measures.py",
    ),
    Mutation(
        "fair scores", "a picture without another caption has a loss of 0", "omni/stages/captions.py",
        '"rows": (~same).any(dim=1).sum(),', '"rows": torch.tensor(B),',
        "tests/test_vision.py::test_a_picture_alone_has_no_part_in_the_loss_of_validation",
    ),
    Mutation(
        "contrast is learnt first", "every size begins at the same log-odds of a word", "omni/models/picture_text.py",
        "min(RARE, math.log(SHOWN / chances))", "RARE",
        "tests/test_vision.py::test_the_word_loss_does_not_drown_the_contrast_at_first",
    ),
    Mutation(
        "questions are understood by their words", "speech recognition hears few questions about pictures",
        "omni/synthetic/speech.py", "open_vocabulary=0.25, picture_questions=0.3,", "open_vocabulary=0.25,",
        "tests/test_synthetic_data.py::test_recognition_hears_many_different_questions_about_pictures",
    ),
    Mutation(
        "speed without bf16", "Muon always multiplies in bf16", "omni/train/optim.py",
        "matrices.bfloat16() if computes_in_bf16(matrices.device) else matrices.float()", "matrices.bfloat16()",
        "tests/test_optim.py::test_bf16_is_used_where_the_hardware_computes_in_it_only",
    ),
    Mutation(
        "foreign formats", "a text in another encoding is read all the same", "omni/data/formats/folders.py",
        'path.read_text("utf-8-sig")', 'path.read_text("utf-8-sig", "replace")',
        "tests/test_formats.py::test_a_text_that_is_missing_or_in_another_encoding_is_a_bad_row",
    ),
    Mutation(
        "foreign formats", "of several tables in a folder one is read", "omni/data/open_manifest.py",
        "if others := kinds[1:]", "if others := [] and kinds[1:]",
        "tests/test_formats.py::test_a_folder_with_several_tables_or_splits_is_refused",
    ),
    Mutation(
        "foreign formats", "the splits of a data set are read as one", "omni/data/open_manifest.py",
        "if (found := _SPLIT.search(name))})) > 1:", "if (found := _SPLIT.search(name))})) > 9:",
        "tests/test_formats.py::test_a_folder_with_several_tables_or_splits_is_refused",
    ),
    Mutation(
        "foreign formats", "rows below a key of one object are one row", "omni/data/formats/gathered.py",
        "return _is_coco(found) or not text[len(line) :].strip() and bool(_list_of_rows(found))",
        "return _is_coco(found)", "tests/test_formats.py::test_rows_below_a_key_of_one_object_are_not_one_row",
    ),
    Mutation(
        "fair scores", "a held-out folder inside of the training's is not told", "omni/train/config.py",
        'return trained == path or trained in path.parents and not (trained / "wav.scp").is_file()',
        "return trained == path",
        "tests/test_config.py::test_a_held_out_folder_inside_of_the_training_s_is_told",
    ),
    Mutation(
        "speech", "a temperature changes no sample", "omni/stages/recognizer.py",
        "self.speaker.codes(texts, references, temperature=at)", "self.speaker.codes(texts, references)",
        "tests/test_talker.py::test_a_listener_counts_the_words_in_training_and_afterwards",
    ),
    Mutation(
        "rows are accounted for", "lines of stage A that stand on both sides are not found", "scripts/check_data.py",
        'sides = ({"": [(line, "") for line in lines]} if lines else {} for lines in (train, held_out))',
        'sides = ({"": [(line, "") for line in lines]} if lines else {} for lines in (train[:0], held_out))',
        "tests/test_check_data.py::test_lines_of_stage_a_are_compared",
    ),
    Mutation(
        "nothing is mixed", "two stages share a folder", "omni/train/run.py",
        "self._refuse_other_stage()", "pass", "tests/test_config.py::test_a_folder_of_another_stage_is_refused",
    ),
    Mutation(
        "fair scores", "that a score is of one question only is not told", "omni/stages/tasks/mixture.py",
        "if asked := Counter(task.questions(spread(task.row_numbers, _ASKED))):", "if asked := Counter():",
        "tests/test_measures.py::test_a_question_that_is_asked_aloud_keeps_the_answers_of_its_ten_people",
    ),
    Mutation(
        "fair scores", "a file on both sides is not told", "omni/train/config.py",
        "return config, notices + on_both_sides(config)", "return config, notices",
        "tests/test_config.py::test_a_file_that_is_trained_on_and_held_out_is_told",
    ),
    Mutation(
        "fair scores", "captions of one picture are validated", "omni/stages/captions.py",
        "if largest < 2:", "if False:",
        "tests/test_vision.py::test_held_out_pictures_that_have_nothing_to_be_told_from_are_refused",
    ),
    Mutation(
        "fair scores", "a rank among few answers is given without the score of a guess", "omni/stages/tasks/mixture.py",
        "> 1.001 / CANDIDATES:", "> 1:",
        "tests/test_measures.py::test_scores_are_the_same_in_any_batches_and_processes",
    ),
    Mutation(
        "fair scores", "a photo with questions has one of its captions", "scripts/prepare_data.py",
        '"captions": list(filter(None, captions[name]))', '"captions": captions[name][:1]',
        "tests/test_public_data.py::test_a_photo_with_questions_has_all_captions_of_the_published_file",
    ),
    Mutation(
        "fair scores", "no person is left out in the VQA accuracy", "omni/stages/tasks/vqa.py",
        "(matches - own) / enough", "matches / enough", "tests/test_measures.py -k 'by_hand or agreement'",
    ),
    Mutation(
        "fair scores", "a word that is repeated earns CIDEr again", "omni/stages/tasks/cider.py",
        "min(weight, true.get(gram, 0.0)) * true", "weight * true", "tests/test_measures.py -k cider",
    ),
    Mutation(
        "fair scores", "a model without an opinion ranks the true answer first", "omni/stages/tasks/measures.py",
        "all(nats[0] < other", "all(nats[0] <= other", "tests/test_measures.py -k likelier_than_all_others",
    ),
    Mutation(
        "fair scores", "an accepted answer is among the wrong ones", "omni/stages/tasks/base.py",
        "if normalise_answer(answer) not in known:", "if answer != references.accepted[0]:",
        "tests/test_measures.py -k 'other_captions or at_most_64'",
    ),
    Mutation(
        "fair scores", "all items have the same wrong answers", "omni/stages/tasks/base.py",
        "permute(positions, len(self), own)", "permute(positions, len(self), 0)",
        "tests/test_measures.py -k at_most_64",
    ),
    Mutation(
        "fair scores", "padding counts as likely tokens", "omni/models/answering.py",
        "nats.view(N, L).sum(dim=1) / (targets != IGNORE_INDEX).sum(dim=1)", "nats.view(N, L).mean(dim=1)",
        "tests/test_measures.py -k likelihood_of_each_answer",
    ),
    Mutation(
        "fair scores", "of ten people's answers one is used", "omni/stages/tasks/pictures.py",
        'messages[-1].get("given") or [messages[-1]["content"]]', '[messages[-1]["content"]]',
        "tests/test_measures.py -k asked_aloud_keeps",
    ),
    Mutation(
        "fair scores", "right answers in the data are not used", "omni/stages/tasks/base.py",
        'return [messages[-1]["content"], *listed_texts(row, "accepted_answers")]', 'return [messages[-1]["content"]]',
        "tests/test_measures.py -k right_answers_in_the_data",
    ),
    Mutation(
        "labels", "invisible characters stay", "omni/common/text.py",
        "None if control or hidden or character in _FILLERS else code", "code",
        "tests/test_labels.py::test_every_invisible_character_leaves_no_trace",
    ),
    Mutation(
        "labels", "joiners go everywhere", "omni/common/text.py",
        'found[0][0] if beside_virama or inside else ""', '""',
        "tests/test_labels.py -k joiners_stay",
    ),
    Mutation(
        "labels", "captions are cut without a word", "train_vision.py",
        "report_cut_captions(run, captions, rows, tokenizer, config.ctx_len)", "pass",
        "tests/test_vision.py -k captions_that_are_cut",
    ),
    Mutation(
        "rows never vanish", "clips are numbered as if no row were left out", "omni/stages/vocoder.py",
        'tuple(batch["sample_rows"])', 'tuple(range(len(batch["frames"])))',
        "tests/test_vocoder.py -k clips_keep",
    ),
    # recordings and speech
    Mutation(
        "bad rows", "a WAV that was cut off is read as a shorter one", "omni/data/sound_files.py",
        "data[1] < data[0] < _LARGEST_SIZE:", "False:",
        "tests/test_sound_files.py::test_every_truncation_of_a_wav_is_refused",
    ),
    Mutation(
        "sound of any kind", "a WAV from a pipe is taken for one that was cut off", "omni/data/sound_files.py",
        "data[1] < data[0] < _LARGEST_SIZE:", "data[1] < data[0]:",
        "tests/test_sound_files.py -k does_not_know_its_length",
    ),
    Mutation(
        "sound of any kind", "a WAV whose size was never written is empty", "omni/data/sound_files.py",
        "zero = riff and data", "zero = False and data", "tests/test_sound_files.py -k does_not_know_its_length",
    ),
    Mutation(
        "bad rows", "what MP3 and M4A say of their length is not looked at", "omni/data/sound_files.py",
        "if packets < declared:", "if False:", "tests/test_sound_files.py -k cut_off",
    ),
    Mutation(
        "sound of any kind", "what cannot be decoded behind the last frame is damage", "omni/data/sound_files.py",
        "if format_name not in _WITHOUT_CONTAINER:", "if True:", "tests/test_sound_files.py -k tags_and_zeros",
    ),
    Mutation(
        "hostile input", "hours of MP3 are decoded before they are refused", "omni/data/audio.py",
        '_refuse_long(source, read, sound.rate, sample_rate, most, "lasts more than")', "pass",
        "tests/test_sound_files.py::test_nothing_is_decoded_beyond_the_bound",
    ),
    Mutation(
        "one count of frames", "resampled lengths are rounded down", "omni/data/audio.py",
        "samples / (from_rate / to_rate) + 0.5)", "samples / (from_rate / to_rate))",
        
        "tests/test_sound_files.py tests/test_stage_recordings.py -k 'counted_exactly or as_many_frames'",
    ),
    Mutation(
        "finite figures", "samples of any size are used", "omni/data/audio.py",
        "if peak <= _MOST_AMPLITUDE:", "if True:",
        "tests/test_audio.py tests/test_stage_recordings.py -k 'flipped_bit or beyond_all_bounds'",
    ),
    Mutation(
        "finite figures", "one large sample sets the scale", "omni/data/audio.py",
        "np.mean(np.abs(waveform) > 1) >= _INT16_SHARE", "True", "tests/test_audio.py -k 16_bit_integers",
    ),
    Mutation(
        "finite figures", "evaluate.py prints figures that are none", "scripts/evaluate.py",
        "if not math.isfinite(value):", "if False:", "tests/test_stage_recordings.py -k not_finite_is_one_line",
    ),
    Mutation(
        "sound of any kind", "channels that cancel out are averaged", "omni/data/audio.py",
        "int(np.argmax(energies)) if cancel_out else None", "None", "tests/test_audio.py -k cancel_out",
    ),
    Mutation(
        "bad rows", "clips of less than a window are used", "omni/data/audio.py",
        "< max(1, min_samples):", "< 1:", "tests/test_stage_recordings.py -k as_many_frames",
    ),
    Mutation(
        "notes", "what was mended is not told", "omni/train/report.py",
        'self.new_notes += batch["notes"]', "pass", "tests/test_stage_recordings.py -k reaches_the_log",
    ),
    Mutation(
        "speech", "--say speaks a paragraph at once", "omni/chat/speech.py",
        'yield "", sentences(text)[found:]', 'yield "", [text]', "tests/test_speaking.py -k forty",
    ),
    Mutation(
        "speech", "an answer is written to its end before it is spoken", "omni/chat/speech.py",
        "in finished_sentences(pieces):", "in finished_sentences(list(pieces)):",
        "tests/test_infer_omni.py -k whole_answer",
    ),
    Mutation(
        "speech", "a sentence is spoken before the states of all of its tokens are known", "omni/chat/speech.py",
        "sentences(text)[found:-1]", "sentences(text + piece)[found:-1]",
        "tests/test_infer_omni.py -k whole_answer",
    ),
    Mutation(
        "speech", "a sentence is spoken before its end", "omni/chat/speech.py",
        "sentences(text)[found:-1]", "sentences(text)[found:]", "tests/test_speaking.py -k pieces_that",
    ),
    Mutation(
        "speech", "each sentence is looked for from the answer's beginning", "omni/chat/assistant.py",
        "self._end = start + len(sentence)", "pass", "tests/test_infer_omni.py -k whole_answer",
    ),
    Mutation(
        "a conversation", "turns are forgotten without a word", "omni/chat/assistant.py",
        "        if oldest > first:\n", "        if False:\n", "tests/test_infer_omni.py -k old_turns",
    ),
    Mutation(
        "a conversation", "an answer is cut without a word", "omni/chat/assistant.py",
        'if len(answer_states.ids) >= sampling["max_new_tokens"]:', "if False:",
        "tests/test_infer_omni.py -k cut_says_so",
    ),
    Mutation(
        "speech", "the time to the first sound begins with the talker", "omni/chat/speech.py",
        "first_s = time.perf_counter() - start_s", "first_s = 0.1",
        "tests/test_infer_omni.py -k timed_from",
    ),
    Mutation(
        "conversation", "Ctrl-C in an answer ends the conversation", "omni/chat/terminal.py",
        "with contextlib.suppress(KeyboardInterrupt):", "with contextlib.nullcontext():",
        "tests/test_infer_omni.py -k ctrl_c",
    ),
    # generation
    Mutation(
        "the weights in use", "kept weights are those of before a change", "omni/models/decoding.py",
        ", parameter._version)", ")", "tests/test_decoding.py -k before_a_change",
    ),
    Mutation(
        "the weights in use", "other weights at a freed address are taken for the former", "omni/models/decoding.py",
        "[parameter.detach() for parameter in model.parameters()]", "None",
        "tests/test_decoding.py -k addresses",
    ),
    Mutation(
        "the weights in use", "a copy of a model reads with the weights of the first", "omni/models/decoding.py",
        'self.__dict__ | {"decode_weights": None}', "self.__dict__", "tests/test_decoding.py -k no_part",
    ),
    Mutation(
        "the weights in use", "the talker's last norm is left out of its heads", "omni/models/decoding.py",
        "(depth.heads.float() * last_norm[:, None])", "depth.heads.float()",
        "tests/test_talker.py -k 'weights_of_now and norms'",
    ),
    Mutation(
        "the weights in use", "the weights are copied for each answer", "omni/models/decoding.py",
        "if kept is None or ", "if True or ", "tests/test_decoding.py -k copied_once",
    ),
    Mutation(
        "speech", "a long sentence is one utterance", "omni/chat/speech.py",
        "while len(sentence.encode()) > UTTERANCE_BYTES:", "while False:", "tests/test_speaking.py",
    ),
    # pictures, films and chat
    Mutation(
        "bad rows", "a decoder's unforeseen exception at a picture or film ends the run", "omni/data/images.py",
        "    except Exception as error:\n        raise BadRow(", "    except OSError as error:\n        raise BadRow(",
        "tests/test_images.py tests/test_video.py -k any_exception_of_a_decoder",
    ),
    Mutation(
        "hostile input", "a picture has sides of any length", "omni/data/images.py",
        " or max(width, height) > MAX_SIDE:", ":",
        "tests/test_images.py::test_an_image_bomb_is_refused_from_its_header",
    ),
    Mutation(
        "hostile input", "only the first frame of an animation is measured", "omni/data/video.py",
        "            if picture.size != size:\n", "            if False:\n",
        "tests/test_video.py::test_every_frame_of_an_animation_is_measured_before_it_is_decoded",
    ),
    Mutation(
        "hostile input", "an animation may cost any work", "omni/data/video.py",
        "budget.spend(*size, wanted[-1] + 1)", "pass",
        "tests/test_video.py::test_small_frames_on_a_large_screen_cost_what_the_screen_does",
    ),
    Mutation(
        "hostile input", "a picture may be of any number of pieces", "omni/data/metadata.py",
        "if self.left < 0:", "if False:",
        "tests/test_images.py tests/test_video.py -k 'pieces or million'",
    ),
    Mutation(
        "hostile input", "a film is decoded from its beginning to its end", "omni/data/video.py",
        "needed.update(range(keys[key], packet + 1))", "needed.update(range(len(packets)))",
        "tests/test_video.py::test_no_more_is_decoded_than_leads_to_the_wanted_frames",
    ),
    Mutation(
        "bad rows", "text, profile and resolution of a PNG are parsed", "omni/data/metadata.py",
        "if name not in _PNG_CHUNKS and name[0] & 0x20:", "if False:",
        "tests/test_images.py::test_broken_metadata_do_not_cost_the_picture",
    ),
    Mutation(
        "bad rows", "broken EXIF costs the picture", "omni/data/images.py",
        "    except Exception:  # Pillow raises", "    except KeyError:  # Pillow raises",
        "tests/test_images.py::test_broken_metadata_do_not_cost_the_picture",
    ),
    Mutation(
        "bad rows", "white letters on a transparent ground are put over white", "omni/data/images.py",
        "return _BLACK if 3 * on_white < on_black else _WHITE", "return _WHITE",
        "tests/test_images.py::test_letters_of_any_grey_on_a_transparent_ground_can_be_seen",
    ),
    Mutation(
        "hostile input", "a text is tokenised before it is measured", "omni/chat/assistant.py",
        "            check_text_length(text, self.ctx_len)\n", "            pass\n",
        "tests/test_infer_omni.py::test_a_line_of_any_length_is_refused_before_it_is_tokenised",
    ),
    Mutation(
        "hostile input", "a model's control characters reach the terminal", "omni/chat/text.py",
        'return _CONTROLS.sub("", text)', "return text",
        "tests/test_infer_omni.py::test_nothing_that_a_model_or_a_name_says_moves_the_cursor",
    ),
    Mutation(
        "conversation", "a question is answered without what could not be attached", "omni/chat/terminal.py",
        "if self.missing and text != self.waiting:", "if False:",
        "tests/test_infer_omni.py::test_a_question_about_what_was_not_attached_waits",
    ),
    Mutation(
        "conversation", "a dragged name stays quoted", "omni/chat/text.py",
        "            names += words\n", "            pass\n",
        "tests/test_infer_omni.py::test_a_name_is_understood_as_programs_write_it",
    ),
    # the page
    Mutation(
        "the page stays up", "a job computes until it has ended", "omni/chat/server.py",
        "        if time.monotonic() >= end:\n            break\n", "",
        "tests/test_web_limits.py -k short_request",
    ),
    Mutation(
        "the page stays up", "speech is made in one piece before others have their turn", "omni/chat/web.py",
        "self.turns.slices(bounded(spoken, pieces, MAX_SPEECH_S, rate))",
        "self.turns.slices(iter(list(bounded(spoken, pieces, MAX_SPEECH_S, rate))))",
        "tests/test_web_demo.py -k long_speech",
    ),
    Mutation(
        "the page stays up", "a visitor's requests all compute at once", "omni/chat/web.py",
        "            async with session.turn:\n                if session.run != run:",
        "            async with contextlib.nullcontext():\n                if session.run != run:",
        "tests/test_web_demo.py -k one_after_the_other",
    ),
    Mutation(
        "the page stays up", "any number of requests is taken", "omni/chat/server.py",
        "if self.jobs >= self.most:", "if False:", "tests/test_web_limits.py -k however",
    ),
    Mutation(
        "the page stays up", "a job that was cancelled keeps its place", "omni/chat/server.py",
        "        try:\n            yield\n        finally:\n            self.jobs -= 1",
        "        yield\n        self.jobs -= 1",
        "tests/test_web_limits.py -k however",
    ),
    Mutation(
        "the page stays up", "a text is not measured", "omni/chat/web.py",
        'check_text_length(text or "")', "pass", "tests/test_web_demo.py -k asked_said_and_kept",
    ),
    Mutation(
        "the page stays up", "speech is of any length", "omni/chat/web_speech.py",
        "piece[:samples]", "piece", "tests/test_web_demo.py -k asked_said_and_kept",
    ),
    Mutation(
        "speech", "an answer's text ends where the page stops speaking", "omni/chat/web_speech.py",
        "    yield from pieces\n", "", "tests/test_web_demo.py -k heard_while",
    ),
    Mutation(
        "speech", "the page shows no text before the answer is spoken", "omni/chat/web_speech.py",
        "    for piece in spoken:\n", "    for piece in list(spoken):\n",
        "tests/test_web_demo.py -k 'heard_while or long_speech'",
    ),
    Mutation(
        "the page stays up", "what is not fetched is sent on", "omni/chat/web.py",
        "while self.unread(request.session_hash) >= MAX_UNREAD:", "while False:",
        "tests/test_web_demo.py -k asked_said_and_kept",
    ),
    Mutation(
        "the page stays up", "any number of conversations is kept", "omni/chat/web.py",
        "blocks.state_session_capacity = SESSIONS", "pass", "tests/test_web_demo.py -k number_of_visitors",
    ),
    Mutation(
        "the page stays up", "a file may be any address", "omni/chat/web.py",
        "gradio.processing_utils.async_ssrf_protected_download = _load_nothing", "pass",
        "tests/test_web_demo.py -k was_not_uploaded",
    ),
    Mutation(
        "the page stays up", "fields of an upload are collected in memory", "omni/chat/web.py",
        "if self._current_part.file is None:", "if False:", "tests/test_web_demo.py -k broken_ones_leave_nothing",
    ),
    Mutation(
        "the page stays up", "an upload that was broken off stays", "omni/chat/web.py",
        "Path(file.name).unlink(missing_ok=True)", "pass",
        "tests/test_web_demo.py -k broken_ones_leave_nothing --timeout 60",
    ),
    Mutation(
        "the page stays up", "half of a surrogate pair reaches the tokenizer", "omni/chat/text.py",
        "[\\ud800-\\udc7f\\udd00-\\udfff]", "[]x]",
        "tests/test_web_demo.py -k surrogate_pair",
    ),
    Mutation(
        "the page stays up", "a fault outside of the buttons' functions is not shown", "omni/chat/web.py",
        "blocks.process_api = process_api", "pass", "tests/test_web_demo.py -k no_unicode",
    ),
    Mutation(
        "the page stays up", "messages are HTML", "omni/chat/web.py",
        'raise gr.Error(html.escape(" ".join(text.split())), print_exception=False)',
        "raise gr.Error(text, print_exception=False)", "tests/test_web_demo.py -k one_line_and_escaped",
    ),
    Mutation(
        "the page stays up", "a body without a length is of any size", "omni/chat/server.py",
        "if len(body) > most:", "if False:", "tests/test_web_limits.py -k before_more_than",
    ),
    Mutation(
        "the page stays up", "an upload without a length is of any size", "omni/chat/server.py",
        "if arrived > self.max_upload:", "if False:", "tests/test_web_limits.py -k before_more_than",
    ),
    Mutation(
        "the page stays up", "a body is read although it is announced too large", "omni/chat/server.py",
        "raise _too_large(limit)", "pass", "tests/test_web_limits.py -k before_more_than",
    ),
    Mutation(
        "the page stays up", "uploads together are of any size", "omni/chat/server.py",
        "if not self.folder.take(size):", "if False:", "tests/test_web_limits.py -k all_uploads",
    ),
    Mutation(
        "the page stays up", "an empty file takes no room", "omni/chat/server.py",
        "max(_BLOCK, found.st_size)", "found.st_size", "tests/test_web_limits.py -k small_files",
    ),
    Mutation(
        "the page stays up", "a request may stop in its middle", "omni/chat/server.py",
        "await asyncio.wait_for(self._receive(), IDLE_S)", "await asyncio.wait_for(self._receive(), 120)",
        "tests/test_web_limits.py -k stops_in_its_middle --timeout 20",
    ),
    Mutation(
        "the page is its own", "pages of other origins are let in", "omni/chat/server.py",
        "and origin not in self.origins", "and False", "tests/test_web_limits.py -k other_origins",
    ),
    Mutation(
        "the page is its own", "a site's name may lead here", "omni/chat/server.py",
        "if not self._is_ours(host):", "if False:", "tests/test_web_limits.py -k other_origins",
    ),
    Mutation(
        "the page is its own", "all of Gradio's routes are open", "omni/chat/server.py",
        "not path.startswith(SENDS)", "False", "tests/test_web_limits.py -k let_through",
    ),
    Mutation(
        "the page is its own", "a folder whose page was killed stays", "omni/chat/server.py",
        "        _delete_if_dead(path)\n", "        pass\n", "tests/test_web_limits.py -k killed_page",
    ),
    Mutation(
        "the page is its own", "a living page's folder is removed", "omni/chat/server.py",
        "fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", "tests/test_web_limits.py -k killed_page",
    ),
    Mutation(
        "the page is its own", "a folder without the page's mark is removed", "omni/chat/server.py",
        "and os.read(owner, len(_MARK)) == _MARK", "", "tests/test_web_limits.py -k killed_page",
    ),
    Mutation(
        "the page is its own", "a link is taken for the mark", "omni/chat/server.py",
        "os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK", "os.O_RDONLY | os.O_NONBLOCK",
        "tests/test_web_limits.py -k killed_page",
    ),
    Mutation(
        "the page is its own", "old files stay", "omni/chat/server.py",
        "if found.st_mtime < oldest:", "if False:", "tests/test_web_limits.py -k too_old",
    ),
    Mutation(
        "files are what they hold", "uploads are sorted by their names", "omni/chat/web.py",
        "kind = kind_of(path)", 'kind = "unknown"', "tests/test_web_demo.py -k what_they_contain",
    ),
    Mutation(
        "files are what they hold", "a cover makes a film", "omni/common/media.py",
        " if Disposition.attached_pic not in track.disposition", "", "tests/test_media_kinds.py -k cover",
    ),
    # files, exports and tokenizers
    Mutation(
        "only ours is replaced", "what else lies in an export is not looked for", "omni/export/folder.py",
        "    _refuse_strangers(target, _own_files(listed))\n", "",
        "tests/test_export_folder.py::test_whatever_else_lies_in_an_export_survives_the_next_one",
    ),
    Mutation(
        "only ours is replaced", "a changed file is replaced", "omni/export/folder.py",
        "file_sha256(path) != digest:", "False:",
        "tests/test_export_folder.py::test_a_file_that_was_changed_since_it_was_exported_is_not_replaced",
    ),
    Mutation(
        "only ours is replaced", "what arrives during the export is not looked for", "omni/export/folder.py",
        "check_target(target, replace)  # again, as the export took a while", "pass",
        "tests/test_export_folder.py::test_whatever_else_lies_in_an_export_survives_the_next_one -k while",
    ),
    Mutation(
        "only ours is replaced", "the folder of an unfinished export is believed to be one", "omni/export/folder.py",
        "    _refuse_strangers(partial, UNFINISHED)\n", "",
        "tests/test_export_folder.py::test_what_stands_at_its_temporary_names_is_left_alone -k partial",
    ),
    Mutation(
        "permissions", "weights are readable for everyone", "omni/export/bundle.py",
        "path.chmod(path.parent.stat().st_mode & 0o666)", "path.chmod(0o644)",
        "tests/test_export_folder.py::test_permissions_are_the_umask_s",
    ),
    Mutation(
        "sealed", "a tokenizer is not compared with its checksum", "omni/train/checkpoint.py",
        "    _compare_files(folder, path, saved.files)\n", "",
        "tests/test_foreign_files.py::test_a_model_s_tokenizer_is_sealed_with_it -k text",
    ),
    Mutation(
        "hostile input", "sizes are not compared before memory is given", "omni/train/checkpoint.py",
        "    load_weights(shapes, weights, path, assign=True)\n", "",
        "tests/test_foreign_files.py::test_an_altered_checkpoint_is_one_line_or_the_same_model",
    ),
    Mutation(
        "hostile input", "a tokenizer may normalise", "omni/data/tokenizer.py",
        "if found.get(key) != expected.get(key):", "if False:",
        "tests/test_foreign_files.py::test_a_tokenizer_that_does_more_than_ours_is_refused",
    ),
    Mutation(
        "hostile input", "a lock follows links", "omni/common/lock.py",
        "os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW", "os.O_RDWR | os.O_CREAT",
        "tests/test_files.py::test_a_lock_is_no_one_else_s_file",
    ),
    Mutation(
        "hostile input", "a temporary file may be there already", "omni/common/files.py",
        'with open(temporary, "xb") as file:', 'with open(temporary, "wb") as file:',
        "tests/test_files.py::test_a_temporary_name_is_a_new_one",
    ),
    Mutation(
        "export", "prompts are padded behind", "omni/export/hf.py",
        '"padding_side": "left"', '"padding_side": "right"',
        "tests/test_export.py::test_the_thinker_answers_a_batch_as_it_answers_each_alone",
    ),
    # caches
    Mutation(
        "caches", "files are not looked at again", "omni/train/precompute.py",
        "problem = arrays_problem(path, belongs_to) or _changed(path, belongs_to, files)",
        "problem = arrays_problem(path, belongs_to)",
        "tests/test_caches.py::test_files_replaced_under_their_old_names_are_noticed",
    ),
    Mutation(
        "caches", "a file of equal size with its time put back is the same", "omni/common/caches.py",
        "stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)", "stat.st_size, stat.st_mtime_ns, 0)",
        "tests/test_caches.py::test_files_replaced_under_their_old_names_are_noticed",
    ),
    Mutation(
        "caches", "the same content at another time is another file", "omni/train/precompute.py",
        "changed += int(((now != contents[some]) & ~gone[some]).sum())", "changed += len(some)",
        "tests/test_caches.py::test_the_same_content_at_another_time_is_the_same",
    ),
    Mutation(
        "caches", "what was made of files that cannot be read now is made again", "omni/train/precompute.py",
        "gone[some] = (now == 0) & (contents[some] != 0)", "pass", "tests/test_caches.py -k cannot_be_read",
    ),
    Mutation(
        "caches", "a worker that hangs while codes are made is waited for", "omni/train/precompute.py",
        "return run.stop_requested or waited_s >= limit", "return False",
        "tests/test_signals.py -k 'before_training_begins and out' --timeout 60",
    ),
    Mutation(
        "caches", "what killed writes left stays", "omni/train/precompute.py",
        "            remove_temporary(path.parent)  # this process holds the lock of save_dir\n", "",
        "tests/test_caches.py -k leftovers",
    ),
    Mutation(
        "caches", "a file that changed while it was read counts as read", "omni/common/caches.py",
        'int.from_bytes(digest.digest(), "little") if found == facts else 0',
        'int.from_bytes(digest.digest(), "little")',
        "tests/test_caches.py::test_a_file_that_changes_while_the_others_are_made",
    ),
    Mutation(
        "caches", "arrays are believed without their digests", "omni/common/caches.py",
        "if file_sha256(array_file(path, name)) != digest:", "if False:",
        "tests/test_caches.py::test_a_damaged_file_of_a_cache_is_made_again",
    ),
    Mutation(
        "caches", "JSON is believed without its digest", "omni/common/files.py",
        "if not isinstance(value, dict) or value.pop(SEAL, None) != json_sha256(value):",
        "if not isinstance(value, dict) or not value.pop(SEAL, None):",
        "tests/test_caches.py::test_damaged_json_is_made_again",
    ),
    Mutation(
        "caches", "a folder in the way is an error", "omni/common/caches.py",
        "        path.rename(aside)\n", "        pass\n",
        "tests/test_caches.py::test_a_damaged_file_of_a_cache_is_made_again",
    ),
    Mutation(
        "caches", "what a kill left half-written is believed", "omni/train/precompute.py",
        'if digest.hexdigest() != batch["sha256"]:', "if False:",
        "tests/test_caches.py::test_what_a_kill_left_half_written_is_made_again",
    ),
    Mutation(
        "caches", "a line of the journal is believed without its digest", "omni/train/precompute.py",
        'if line.endswith(b"\\n") and line[:_SEAL_BYTES] == _line_seal(value) else None', "if value else None",
        "tests/test_caches.py::test_what_a_kill_left_half_written_is_made_again",
    ),
    Mutation(
        "caches", "a kill costs all batches", "omni/train/precompute.py",
        "return lines if known else None", "return None",
        "tests/test_caches.py::test_a_kill_costs_one_batch",
    ),
    Mutation(
        "caches", "batches of other files are gone on with", "omni/train/precompute.py",
        '_parsed(lines[0]) == {"key": key}', "_parsed(lines[0])",
        "tests/test_caches.py::test_a_kill_then_other_files_then_a_resume",
    ),
    Mutation(
        "caches", "measured files are not looked at again", "omni/data/measure.py",
        """if not problem and facts and (changed := int((open_arrays(path)[0]["files"] != facts["files"]).sum())):""",
        "if facts and (changed := 0):",
        "tests/test_caches.py::test_only_changed_files_are_measured_again",
    ),
    Mutation(
        "caches", "statistics do not know their files", "omni/stages/codec.py",
        'belongs_to | {"files": files_digest(manifest, some, "wav")}', "belongs_to",
        "tests/test_caches.py::test_statistics_know_their_files_and_are_finite",
    ),
    Mutation(
        "caches", "statistics that are not finite are kept", "omni/common/caches.py",
        "if not values.isfinite().all():", "if False:",
        "tests/test_caches.py::test_statistics_know_their_files_and_are_finite",
    ),
    Mutation(
        "config config_diff", "other codes are the same training", "train_talker.py",
        'text_data | models | {"codes": coded.sha256, "validation codes": val_coded.sha256}', "text_data | models",
        "tests/test_caches.py::test_recordings_replaced_in_mid_training_are_another_training",
    ),
    Mutation(
        "config config_diff", "other features are the same training", "omni/train/precompute.py",
        'if found else {}', "if False else {}",
        "tests/test_caches.py::test_pictures_replaced_in_mid_training_are_another_training",
    ),
    Mutation(
        "config config_diff", "other lengths are the same order of samples", "omni/train/training.py",
        "if dataset.lengths is not None:  #", "if False:  #",
        "tests/test_caches.py::test_lengths_that_change_in_mid_training_are_another_training",
    ),
    # steps and processes
    Mutation(
        "a step that was made is kept", "it is judged before it is saved", "omni/train/loop.py",
        "            self.save()\n            self.report.restart_clock()\n        if validates:\n"
        "            validate(training, self.report, self._give_up, self.stop)\n",
        "            validates and validate(training, self.report, self._give_up, self.stop)\n            self.save()\n"
        "        if validates:\n",
        "tests/test_validation.py::test_every_validation_fails_once_and_no_step_is_made_twice -k text",
    ),
    Mutation(
        "a step that was made is kept", "what its validation found is forgotten", "omni/train/resume.py",
        "return payload | validated", "return payload",
        "tests/test_validation.py::test_what_a_validation_found_is_of_its_step_or_is_found_again -k text",
    ),
    Mutation(
        "a step that was made is kept", "what another step's validation found is taken for its own",
        "omni/train/progress.py",
        'found.pop(_STEP_FILE, "").encode() == step_file', 'found.pop(_STEP_FILE, "x")',
        "tests/test_validation.py -k another_file_of_the_same_step",
    ),
    Mutation(
        "a step that was made is kept", "the row of a validation that is made again stays", "omni/train/logs.py",
        'step + (validated or row["kind"] != "val")', "step + 1",
        "tests/test_validation.py::test_what_a_validation_found_is_of_its_step_or_is_found_again -k text",
    ),
    Mutation(
        "loss not finite", "a validation that is not finite is the best", "omni/train/validation.py",
        "math.isfinite(metrics[name]) and not", "not",
        "tests/test_validation.py::test_what_is_not_finite_is_said_and_never_best -k text",
    ),
    Mutation(
        "elastic", "a restarted process calls those that are dead", "omni/train/processes.py",
        'if os.environ.get("LOCAL_WORLD_SIZE") == str(world):', "if False:",
        "tests/test_elastic.py::test_torchrun_restarts_after_a_kill --timeout 60",
    ),
    Mutation(
        "elastic", "each process chooses what it resumes", "omni/train/resume.py",
        "payload = checkpoint.load(path)\n                if", "payload = checkpoint.newest(folder, prefix, run.log)\n"
        "                if",
        "tests/test_elastic.py::test_the_first_process_alone_decides_what_is_resumed -k text --timeout 60",
    ),
    Mutation(
        "elastic", "a process that hangs is waited for", "omni/train/run.py",
        "self.meet(self.device, max(processes.EXCHANGE_S,", "self.meet(self.device, max(1e5,",
        "tests/test_elastic.py::test_one_of_two_hangs_and_the_other_says_so -k text --timeout 60",
    ),
    Mutation(
        "elastic", "that another process has ended is a traceback", "omni/train/cli.py",
        'isinstance(error, dist.DistError) or "gloo" in reason', "False",
        "tests/test_elastic.py::test_one_of_two_is_killed_and_the_other_ends_by_itself -k 'text and 0' --timeout 60",
    ),
    Mutation(
        "elastic", "samples_per_step is not looked at", "omni/train/run.py",
        "        return steps\n", "        return self.config.gradient_accumulation_steps\n",
        "tests/test_elastic.py::test_one_process_two_and_one_again_have_the_same_samples_in_each_step -k text",
    ),
    Mutation(
        "elastic", "folders that are not shared are not noticed", "omni/train/processes.py",
        "        if blind:\n", "        if False:\n",
        "tests/test_elastic.py::test_a_folder_that_not_all_processes_see_is_refused --timeout 60",
    ),
    Mutation(
        "signals", "a batch is waited for, for ever", "omni/data/order.py",
        "with _every_second(look):", "if look:",
        "tests/test_signals.py::test_a_worker_that_hangs_is_noticed_and_the_step_is_saved"
        " -k 'text and signal and training' --timeout 60",
    ),
    Mutation(
        "signals", "before the end, workers are waited for", "omni/train/cli.py",
        "            held.append(error)\n", "            pass\n",
        "tests/test_signals.py::test_a_worker_that_hangs_is_noticed_and_the_step_is_saved -k 'text and signal'",
    ),
    Mutation(
        "signals", "one process without a batch does not tell the others", "omni/train/loop.py",
        "if run.stop_agreed(None in micro_batches):", "if run.stop_agreed():",
        "tests/test_elastic.py::test_one_of_two_has_no_batch_and_both_save_and_stop -k text --timeout 60",
    ),
    Mutation(
        "signals", "a hangup ends the run unsaved", "omni/common/host.py",
        "(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)", "(signal.SIGINT, signal.SIGTERM)",
        "tests/test_signals.py::test_a_hangup_saves_however_often_it_comes_and_nohup_ignores_it -k text",
    ),
    Mutation(
        "signals", "a signal after a hangup ends the run unsaved", "omni/train/run.py",
        "self._asked_to_stop |= number != signal.SIGHUP", "self._asked_to_stop = True",
        "tests/test_signals.py::test_a_hangup_saves_however_often_it_comes_and_nohup_ignores_it -k text",
    ),
    Mutation(
        "environment", "closed streams stay closed", "omni/train/cli.py",
        "    streams.secure()\n", "", "tests/test_signals.py::test_a_run_needs_no_streams -k text",
    ),
    # downloads and fuzzing
    Mutation(
        "downloads", "a server may send without end", "omni/data/transfer.py",
        "if self.file.tell() + len(block) > most:", "if False:",
        "tests/test_prepare_data.py::test_a_download_stops_at_the_published_size",
    ),
    Mutation(
        "downloads", "an archive may unpack to anything", "omni/data/archives.py",
        "if self.n_bytes < 0:", "if False:", "tests/test_prepare_data.py::test_a_bomb_is_stopped",
    ),
    Mutation(
        "downloads", "only some errors of archives are known", "omni/data/archives.py",
        "    except _DAMAGES as error:\n",
        "    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:\n",
        "tests/test_prepare_data.py::test_a_zip_that_cannot_be_read",
    ),
    Mutation(
        "downloads", "any text is taken for what is published", "scripts/prepare_data.py",
        "except DAMAGES as error:", "except csv.Error as error:",
        "tests/test_prepare_data.py::test_texts_that_are_not_as_published",
    ),
    Mutation(
        "downloads", "a member of a package has any size", "omni/data/archives.py",
        "if int(fields[2]) > size - file.tell():", "if False:",
        "tests/test_prepare_data.py::test_a_package_that_cannot_be_read",
    ),
    Mutation(
        "downloads", "an empty recording is converted", "scripts/prepare_data.py",
        "    if not samples:\n", "    if False:\n",
        "tests/test_prepare_data.py::test_hostile_and_broken_archives -k 'empty'",
    ),
    Mutation(
        "downloads", "fewer converted files are downloaded again", "omni/data/download.py",
        "if archive.convert and not archive.count:", "if archive.convert:",
        "tests/test_prepare_data.py::test_asterisk",
    ),
    Mutation(
        "downloads", "remarks in brackets stay in transcripts", "scripts/prepare_data.py",
        r're.sub(r"\[.*?\]|\(.*?\)|<.*?>|\.{3}", " ", text)', "text",
        "tests/test_prepare_data.py::test_asterisk",
    ),
    Mutation(
        "downloads", "all of a slow archive is downloaded for a part of it", "omni/data/download.py",
        "return min(total, int(", "return max(total, int(",
        "tests/test_prepare_data.py::test_of_a_slow_archive_only_the_wanted_part_is_downloaded",
    ),
    Mutation(
        "downloads", "a part that cannot be unpacked is enough", "omni/data/download.py",
        "            if len(items) == limit:\n", "            if items:\n",
        "tests/test_prepare_data.py::test_of_a_slow_archive_that_is_cut_between_files_more_is_downloaded",
    ),
    Mutation(
        "downloads", "another subset replaces the rows of the first", "scripts/prepare_data.py",
        "or earlier_items(store, archive, folder)", "or None",
        "tests/test_prepare_data.py::test_another_subset_adds_its_rows",
    ),
    Mutation(
        "downloads", "an utterance of two subsets has two rows", "scripts/prepare_data.py",
        "of_archive = {Path(name).stem:", "of_archive = {name:",
        "tests/test_prepare_data.py::test_another_subset_adds_its_rows",
    ),
    Mutation(
        "downloads", "transcripts are in capitals", "scripts/prepare_data.py",
        'line.lower().split(" ", 1)', 'line.split(" ", 1)',
        "tests/test_prepare_data.py::test_every_dataset_in_one_line_and_nothing_twice",
    ),
    Mutation(
        "downloads", "a word in another case is another word", "scripts/prepare_data.py",
        "words = sorted({word_of(name).lower() for", "words = sorted({word_of(name) for",
        "tests/test_prepare_data.py::test_words_are_held_out_whatever_their_case",
    ),
    Mutation(
        "downloads", "conversations are held out, not pictures", "scripts/prepare_data.py",
        "is_held_out(name, HELD_OUT)", "is_held_out(f'{name}{len(rows[train])}', HELD_OUT)",
        "tests/test_prepare_data.py::test_all_conversations_about_a_picture_are_on_one_side",
    ),
    Mutation(
        "downloads", "of several files no command is named", "omni/train/config.py",
        'files = next((file for file in files if not os.path.exists(file)), "")', 'files = ""',
        "tests/test_config.py -k of_several_files",
    ),
    Mutation(
        "downloads", "no public data are named where a file is missing", "omni/train/config.py",
        "    if (name := Path(files).name.partition(\".\")[0]) in PREPARED_BY:", "    if False:",
        "tests/test_config.py::test_a_missing_file_of_a_config_is_named_with_the_command_that_makes_it",
    ),
    Mutation(
        "downloads", "a question is asked about another photo", "scripts/prepare_data.py",
        'files.get(question["image_id"])', 'next(iter(files.values()))',
        "tests/test_prepare_data.py::test_questions_about_pictures",
    ),
    Mutation(
        "downloads", "a box reaches beyond its photo", "scripts/prepare_data.py",
        "box = (max(0, left), max(0, top),", "box = (left, top,",
        "tests/test_prepare_data.py::test_words_of_photos",
    ),
    Mutation(
        "downloads", "written questions are held out at random", "scripts/make_synthetic_datasets.py",
        "sides[zlib.crc32(text.encode()) < HELD", "sides[zlib.crc32(text[::-1].encode()) < HELD",
        "tests/test_synthetic_data.py::test_questions_that_are_held_out_are_those_that_stage_e_holds_out",
    ),
    Mutation(
        "downloads", "a plan downloads", "scripts/prepare_data.py",
        "    if args.plan:\n", "    if not args.plan:\n",
        "tests/test_prepare_data.py::test_a_plan_changes_nothing",
    ),
    Mutation(
        "downloads", "any record is believed", "omni/data/download.py",
        "        if not _is_record(made):\n", "        if made is None:\n",
        "tests/test_prepare_data.py::test_damaged_records_are_no_tracebacks",
    ),
    Mutation(
        "fuzzing", "a case may take any time", "tests/fuzz.py",
        "signal.alarm(SECONDS)", "signal.alarm(0) or None", "tests/test_fuzz.py::test_what_is_a_finding",
    ),
    Mutation(
        "fuzzing", "a process that ends early has found nothing", "tests/fuzz.py",
        'if rows and rows[-1]["number"] == numbers[-1]:', "if code == 0:", "tests/test_fuzz.py::test_what_is_a_finding",
    ),
    Mutation(
        "fuzzing", "memory may grow", "tests/fuzz.py",
        "if grown > RESIDENT:", "if False:", "tests/test_fuzz.py::test_what_is_a_finding",
    ),
    # numerics and the allocator
    Mutation(
        "numerics", "positions decay", "omni/train/optim.py",
        'not in ("original0", *getattr(layer, "no_decay", ()))', 'not in ("original0",)',
        "tests/test_optim.py -k 'kernels_and_embeddings and vision'",
    ),
    Mutation(
        "numerics", "a packed row attends to the row before it", "omni/models/layers.py",
        "groups = packing.split(heads)", "groups = [heads]", "tests/test_packing.py -k padded_ones",
    ),
    Mutation(
        "numerics", "the order of packed rows is lost", "omni/models/packing.py",
        "self.source = order[rows] * width + steps", "self.source = rows * width + steps",
        "tests/test_packing.py -k padded_ones",
    ),
    Mutation(
        "numerics", "near distances are compared in TF32", "omni/common/numerics.py",
        'setting.fp32_precision = "ieee"', "pass", "tests/test_ops.py -k coarse",
    ),
    Mutation(
        "numerics", "a phase that begins late has the schedule of the first", "omni/train/training.py",
        "            step - phase.first_step,", "            step,",
        "tests/test_vocoder.py -k adv_start_step",
    ),
    Mutation(
        "computed once", "what another stage has is computed again", "omni/train/precompute.py",
        "if problem and known and _copied(", "if False and _copied(", "tests/test_caches.py -k is_not_made_again",
    ),
    Mutation(
        "computed once", "what another stage has of other files is taken", "omni/train/precompute.py",
        "as in {known}{instead}\")\n                problem = _changed(path, belongs_to, files)",
        "as in {known}{instead}\")\n                problem = \"\"",
        "tests/test_caches.py -k of_other_files_is_not_taken",
    ),
    Mutation(
        "one clear line", "a compilation that fails is a traceback", "omni/train/loop.py",
        "with compilation(run), run", "with run", "tests/test_distributed.py -k compilation_that_fails",
    ),
    Mutation(
        "the demo", "two trainings have all cores each", "scripts/demo.py",
        'str(cores // together)', "str(cores)", "tests/test_demo.py -k half_of_the_cores",
    ),
    Mutation(
        "the demo", "codec and aligner wait for stage B", "omni/stages/talker.py",
        'None if key == "audio_ckpt" and self.parts_only else getattr', "getattr",
        "tests/test_talker.py -k need_no_stage_b",
    ),
    Mutation(
        "the demo", "features of encoders wait for stage D", "omni/stages/omni.py",
        'None if key == "talker_ckpt" and self.features_only else getattr', "getattr",
        "tests/test_features.py -k need_no_talker",
    ),
    Mutation(
        "the demo", "features of encoders are those of a task of the talker, too", "sft_omni.py",
        "config.without_talker() if config.features_only else config", "config",
        "tests/test_features.py -k need_no_talker",
    ),
    Mutation(
        "the demo", "a training follows the features that alone are asked for", "sft_omni.py",
        "        if config.features_only:\n", "        if False:\n", "tests/test_features.py -k need_no_talker",
    ),
    Mutation(
        "the demo", "a smaller group of made files counts as a larger one", "scripts/make_synthetic_datasets.py",
        "whole = len(sizes) == stop - start", "whole = bool(sizes)",
        "tests/test_synthetic_data.py -k all_its_files",
    ),
    Mutation(
        "resume", "features of another training are replaced before it is refused", "sft_omni.py",
        "        refuse_another_training(run, asked, parts)", "        pass",
        "tests/test_features.py -k another_training",
    ),
    Mutation(
        "resume", "features_only compares the config without the talker", "sft_omni.py",
        "refuse_another_training(run, asked, parts)", "refuse_another_training(run, config, parts)",
        "tests/test_features.py -k need_no_talker",
    ),
    Mutation(
        "data", "rows that the training will use are told as left out", "omni/stages/tasks/prepare.py",
        "if not config.features_only:", "if True:", "tests/test_features.py -k need_no_talker",
    ),
    Mutation(
        "conversation", "one attachment makes up for all that failed", "omni/chat/terminal.py",
        "[failed for failed in self.missing if failed != corrected]", "[]",
        "tests/test_infer_omni.py::test_a_question_about_what_was_not_attached_waits",
    ),
    Mutation(
        "one clear line", "an address is looked for as a file", "omni/data/named_files.py",
        "if _ADDRESS.match(name):", "if False:", "tests/test_rows.py -k what_is_no_file",
    ),
    Mutation(
        "one clear line", "--show is silently nothing beside --json", "scripts/evaluate.py",
        "if args.show and args.json:", "if False:", "tests/test_evaluate.py -k one_json_object",
    ),
    Mutation(
        "one clear line", "what has no word is spoken", "omni/chat/speech.py",
        "if not any(character.isalnum() for character in text):", "if False:",
        "tests/test_speaking.py -k too_long_is_one_line",
    ),
    Mutation(
        "the demo", "a stage without figures ends the table with an error", "scripts/demo.py",
        "        if not metrics:\n", "        if False:\n", "tests/test_tesseract.py -k compares_the_two",
    ),
    Mutation(
        "speed", "scripts start without the allocator's settings", "omni/train/cli.py",
        "    if argv is None:  # run as a script, not by a test\n", "    if False:\n", "tests/test_allocator.py",
    ),
    Mutation(
        "config drift", "other classes of a zero-shot validation are taken for the same", "train_vision.py",
        'fingerprint["classes"] = classes.sha256', "pass", "tests/test_vision.py -k other_classes",
    ),
    Mutation(
        "evaluation", "a batch that does not come is waited for", "omni/train/evaluation.py",
        "lambda waited_s: waited_s >= _TIMEOUT_S", "lambda waited_s: False",
        "tests/test_evaluate.py -k worker_that_hangs",
    ),
    Mutation(
        "checkpoints", "one without its architecture is opened with the default sizes", "omni/train/checkpoint.py",
        "    architecture: dict[str, Any]\n", "    architecture: dict[str, Any] = {}\n",
        "tests/test_export.py -k without_an_architecture",
    ),
    Mutation(
        "the page stays up", "questions are offered that the model cannot take", "scripts/web_demo.py",
        "return not assistant.lacks(", "return True or assistant.lacks(",
        "tests/test_web_demo.py -k examples_are_copied",
    ),
    Mutation(
        "structure", "the built-in world is known elsewhere", "scripts/web_demo.py",
        "from omni.train.device import pick_device", "from omni.train.device import pick_device\nimport omni.synthetic",
        "tests/test_rooms.py -k built_in_world",
    ),
    Mutation(
        "structure", "models import what stands above them", "omni/models/thinker.py",
        "from omni.models.decoding import", "import omni.train.config\nfrom omni.models.decoding import",
        "tests/test_rooms.py -k downwards",
    ),
    Mutation(
        "independent judges", "weights may be any", "scripts/judges.py",
        "if (found := hashlib.sha256(content).hexdigest()) != expected:",
        "if (found := hashlib.sha256(content).hexdigest()) is None:",
        "tests/test_second_opinion.py -k digests",
    ),
    Mutation(
        "independent judges", "a voice is compared with its own recording", "scripts/judges.py",
        " and clip.text != text]", "]", "tests/test_second_opinion.py -k other_texts",
    ),
    Mutation(
        "independent judges", "a speaker's figures are those of all", "scripts/second_opinion.py",
        "chosen = [marks[row] for row in rows]", "chosen = marks",
        "tests/test_second_opinion.py -k speakers_have_rows",
    ),
    Mutation(
        "independent judges", "a clip without a text is passed over", "scripts/second_opinion.py",
        "    if found:\n", "    if False:\n", "tests/test_second_opinion.py -k text_that_is_missing",
    ),
    Mutation(
        "independent judges", "the page shows transcripts as HTML", "scripts/listening_page.py",
        "{html.escape(text)}</p>", "{text}</p>", "tests/test_second_opinion.py -k self_contained",
    ),
    Mutation(
        "spoken forms", "digits stay in transcripts", "omni/stages/audio_encoder.py",
        "normalise_text(spoken_form(single_blanks(audible(text)), language))", "normalise_text(audible(text))",
        "tests/test_spoken.py -k one_target",
    ),
    Mutation(
        "spoken forms", "digits stay in what the talker reads", "omni/models/aligner.py",
        "spoken_form(single_blanks(audible(text)), language).split()", "audible(text).split()",
        "tests/test_spoken.py -k one_target",
    ),
    Mutation(
        "spoken forms", "the voice reads texts as they are written", "omni/models/speaker.py",
        "        symbols = text_symbols(text, self.text_language)\n", "        symbols = text_symbols(text)\n",
        "tests/test_speaking.py -k number",
    ),
    Mutation(
        "spoken forms", "states of an answer are counted by its written bytes", "omni/stages/tasks/processor.py",
        "speech_bytes(answer, self.talker.text_language)", "speech_bytes(answer)",
        "tests/test_sft.py -k words_of_a_number",
    ),
    Mutation(
        "spoken forms", "English is spoken where no language is chosen", "omni/common/spoken.py",
        "    if language is None:\n        return [(text", "    if False:\n        return [(text",
        "tests/test_spoken.py -k without_a_language",
    ),
    Mutation(
        "spoken forms", "digits between letters of other scripts become English words", "omni/common/spoken.py",
        "        if _OTHER_SCRIPT.search(word[0]):\n            yield", "        if False:\n            yield",
        "tests/test_spoken.py -k other_scripts",
    ),
    Mutation(
        "spoken forms", "phonemes share a byte of two", "omni/stages/tasks/processor.py",
        "alone = len(piece) == last - first and len(own)", "alone = len(own)",
        "tests/test_spoken.py -k 'has_a_byte and ipa'",
    ),
    Mutation(
        "spoken forms", "phonemes stand for the words before them", "omni/common/spoken.py",
        "yield word_in_ipa(word[0]), source(word.start())", "yield word_in_ipa(word[0]), source(done)",
        "tests/test_spoken.py -k pieces",
    ),
    Mutation(
        "spoken forms", "phonemes without a dictionary are letters", "omni/common/espeak.py",
        'if (found := library.phonemes("hello", _ACCENT)) != [("həlˈoʊ", "")]:', "if False:",
        "tests/test_spoken.py -k without_its_data",
    ),
    Mutation(
        "exact resume", "a version is cut off before what has changed", "omni/train/resume.py",
        'return version[:12] if re.fullmatch("[0-9a-f]{64}", version) else version', "return version[:12]",
        "tests/test_spoken.py -k another_version",
    ),
    Mutation(
        "speed", "channels are last in memory for float32 too", "omni/models/vocoder.py",
        "return x if channels_last else x.contiguous()", "return x", "tests/test_vocoder.py -k channels_are_last",
    ),
    Mutation(
        "spoken forms", "a recogniser is taught phonemes", "omni/stages/audio_encoder.py",
        "text_language: Spelled | None", "text_language: Language | None", "tests/test_spoken.py -k recogniser",
    ),
    Mutation(
        "spoken forms", "a digit that was beside a letter leaves its word beside it", "omni/common/spoken.py",
        '" " * (before.isalnum() and words[0] != " ")', '""', "tests/test_spoken.py -k reads",
    ),
    Mutation(
        "spoken forms", "a run goes on with words of another version", "train_audio_enc.py",
        "                **spoken_version(config.text_language),\n", "",
        "tests/test_spoken.py -k another_version",
    ),
    Mutation(
        "built-in data", "held-out sentences in a text of the user are trained on",
        "scripts/make_synthetic_datasets.py",
        "[text for text in usable if text not in held_out]", "usable",
        "tests/test_open_vocabulary.py -k never_trained_on",
    ),
    Mutation(
        "built-in data", "what another size alone made stays", "scripts/make_synthetic_datasets.py",
        "for name in former - names_in(stamp):", "for name in ():", "tests/test_synthetic_data.py -k another_size",
    ),
    Mutation(
        "built-in data", "a stamp names files outside its folder", "scripts/make_synthetic_datasets.py",
        "for name in listed if Path(name).name == name", "for name in listed",
        "tests/test_synthetic_data.py -k another_size",
    ),
    Mutation(
        "built-in data", "an unusable voice is a traceback", "scripts/make_synthetic_datasets.py",
        "    except (OSError, UserError) as error:\n        result", "    except OSError as error:\n        result",
        "tests/test_open_vocabulary.py -k error_in_a_group",
    ),
    Mutation(
        "built-in data", "a new reader reads training sentences", "omni/synthetic/speech.py",
        'READING = ("heart",', 'READING = ("new-pico",', "tests/test_synthetic_data.py -k readers_are_named",
    ),
    Mutation(
        "vocoder", "the mel loss has one window", "omni/stages/vocoder.py",
        "for window in config.mel_loss_windows", "for window in ()", "tests/test_vocoder.py -k by_hand",
    ),
    Mutation(
        "held-out words", "training says them", "omni/synthetic/speech.py",
        "        if not collection.unseen and open_vocabulary.held_out_words(text):\n            continue\n", "",
        "tests/test_open_vocabulary.py -k ever_said",
    ),
    Mutation(
        "held-out words", "one in a held-out sentence is enough", "omni/synthetic/open_vocabulary.py",
        "HELD_OUT_WORDS = 2", "HELD_OUT_WORDS = 1", "tests/test_open_vocabulary.py -k ever_said",
    ),
    Mutation(
        "held-out words", "their other forms are said", "omni/synthetic/vocabulary.py",
        "    return frozenset((word, *(lemma for found in getAllLemmas(word).values() for lemma in found)))",
        "    return frozenset((word,))", "tests/test_open_vocabulary.py -k forms",
    ),
    Mutation(
        "held-out words", "words that the small world needs are held out", "omni/synthetic/open_vocabulary.py",
        "for lemma in vocabulary().lemmas - kept\n", "for lemma in vocabulary().lemmas\n",
        "tests/test_open_vocabulary.py -k tenth",
    ),
    Mutation(
        "built-in data", "offensive words are read aloud", "omni/synthetic/vocabulary.py",
        " and word not in offensive", "", "tests/test_open_vocabulary.py -k offensive",
    ),
    Mutation(
        "built-in data", "a text of the user that has changed is not read again", "scripts/make_synthetic_datasets.py",
        ', "sha256": digest}', "}",
        "tests/test_open_vocabulary.py -k has_changed",
    ),
    Mutation(
        "pitch", "pulses begin anew in each piece", "omni/models/vocoder.py",
        "pulse = pulses(pitch, self.spec)[:, first * hop :]", "pulse = pulses(pitch[:, first:], self.spec)",
        f"{PITCH}::test_pieces_are_slices_of_the_whole",
    ),
    Mutation(
        "pitch", "noise begins anew in each piece", "omni/models/vocoder.py",
        "torch.arange(first * hop, last * hop, device=log_mel.device)",
        "torch.arange((last - first) * hop, device=log_mel.device)",
        f"{PITCH}::test_pieces_are_slices_of_the_whole",
    ),
    Mutation(
        "pitch", "the pitch's context is not waited for", "omni/models/vocoder.py",
        "super().context_frames - 2 + of_source +", "super().context_frames - 2 +",
        f"{PITCH}::test_a_frame_is_heard_no_earlier_than_the_context",
    ),
    Mutation(
        "pitch", "the last bits of a pitch are kept", "omni/models/excitation.py",
        "(LOWEST * torch.exp(place / _STEPS) / _FINEST).round() * _FINEST", "LOWEST * torch.exp(place / _STEPS)",
        "tests/test_talker.py::test_streamed_sound_is_the_sound_of_the_whole",
    ),
    Mutation(
        "pitch", "two periods are as good as one", "omni/models/excitation.py",
        "_OCTAVE_COST = 0.02", "_OCTAVE_COST = -0.02",
        f"{PITCH}::test_the_pitch_of_a_voice_is_found",
    ),
    Mutation(
        "pitch", "noise has a pitch", "omni/models/excitation.py",
        "_VOICED = 0.5", "_VOICED = 0.0",
        f"{PITCH}::test_noise_and_silence_have_none",
    ),
    Mutation(
        "pitch", "silence has a pitch", "omni/models/excitation.py",
        "_SILENT = 1e-3", "_SILENT = 0.0",
        f"{PITCH}::test_noise_and_silence_have_none",
    ),
    Mutation(
        "pitch", "brightness counts", "omni/models/excitation.py",
        "torch.sigmoid((BRIGHTEST - hertz) / 200)", "torch.ones_like(hertz)",
        f"{PITCH}::test_a_bright_sound_has_its_own_pitch_and_not_half_of_it",
    ),
    Mutation(
        "pitch", "a hum has the highest pitch", "omni/models/excitation.py",
        "is_peak & (here > _VOICED)", "(here > _VOICED)",
        f"{PITCH}::test_a_hum_below_the_lowest_pitch_has_none",
    ),
    Mutation(
        "pitch", "a segment is learnt with the pitch of the clip's beginning", "omni/stages/vocoder.py",
        'sample["pitch"] = segment_pitch(waveform, start, frames, self.spec)',
        'sample["pitch"] = segment_pitch(waveform, 0, frames, self.spec)',
        f"{PITCH}::test_a_segment_is_learnt_with_its_own_pitch",
    ),
    Mutation(
        "pitch", "a segment ends in its reflection", "omni/stages/vocoder.py",
        "piece, first = _with_context(waveform, start, frames, pitch_window(spec), spec)",
        "piece, first = waveform[start * spec.hop_length :][: frames * spec.hop_length], start",
        f"{PITCH}::test_a_segment_has_the_pitch_of_the_whole_clip",
    ),
    Mutation(
        "pitch", "a voice has no noise", "omni/models/excitation.py",
        "share = (pitch > 0)[..., None] * torch.sigmoid((HALF_VOICED - bins) / 500)",
        "share = (pitch > 0)[..., None] * torch.ones_like(bins)",
        f"{PITCH}::test_without_a_voice_it_is_noise_and_with_one_it_is_noise_at_the_top_only",
    ),
    Mutation(
        "pitch", "the spectrum's window is made for listening only", "omni/data/audio.py",
        "with torch.inference_mode(False):  # they are kept, for training too", "if True:",
        f"{PITCH}::test_a_spectrum_made_for_listening_serves_training",
    ),
    Mutation(
        "pitch", "a vocoder with pulses is exported as SpeechT5's", "export.py",
        "if vocoder.architecture.harmonic_source:", "if False:",
        "tests/test_export.py::test_a_vocoder_that_transformers_does_not_know_opens_in_pytorch_alone",
    ),
    Mutation(
        "pitch", "its program has the weights as they were trained", "export.py",
        "vocoder.load_state_dict(rounded(vocoder.state_dict(), dtype, statistics))", "pass",
        "tests/test_export.py::test_a_vocoder_that_transformers_does_not_know_opens_in_pytorch_alone",
    ),
    Mutation(
        "disk full", "a program is written by torch itself", "omni/export/program.py",
        "(folder / PROGRAM).write_bytes(file.getbuffer())", "torch.export.save(program, folder / PROGRAM)",
        "tests/test_export.py -k full_disk",
    ),
    Mutation(
        "pitch", "its program names folders", "omni/export/program.py",
        'node.meta.pop("stack_trace", None)', "pass",
        "tests/test_export.py::test_a_vocoder_that_transformers_does_not_know_opens_in_pytorch_alone",
    ),
    Mutation(
        "pitch", "its program is for some numbers of frames", "omni/export/program.py",
        "LEAST_FRAMES, MOST_FRAMES = 3, 1 << 20", "LEAST_FRAMES, MOST_FRAMES = 3, 64",
        "tests/test_export.py::test_a_vocoder_that_transformers_does_not_know_opens_in_pytorch_alone",
    ),
    Mutation(
        "several voices", "a clip is its own reference", "omni/stages/voices.py",
        "index + (index >= np.searchsorted(clips, row))", "index",
        f"{VOICES}::test_a_reference_is_another_clip_of_the_speaker_and_the_own_one_only_without_another",
    ),
    Mutation(
        "several voices", "references are drawn anew in each run", "omni/stages/voices.py",
        "index = int(rng.integers(len(clips) - 1))", "index = int(np.random.default_rng().integers(len(clips) - 1))",
        f"{VOICES}::test_a_reference_depends_on_seed_epoch_and_row_alone",
    ),
    Mutation(
        "several voices", "the padding of references counts", "omni/models/voices.py",
        "(self.norm(frames) * mask).sum(dim=1) / lengths[:, None]", "self.norm(frames).mean(dim=1)",
        f"{VOICES}::test_padding_of_references_changes_nothing",
    ),
    Mutation(
        "several voices", "durations do not depend on the voice", "omni/models/talker.py",
        "            x = x + voices[:, None]\n        for layer in self.text_layers:",
        "            pass\n        for layer in self.text_layers:",
        f"{VOICES}::test_durations_and_codes_depend_on_the_voice",
    ),
    Mutation(
        "several voices", "frames are spoken without the voice that they are trained with", "omni/models/talker.py",
        "spoken = spoken + voices[:, None]", "pass",
        f"{VOICES}::test_generating_in_a_voice_equals_the_whole_forward",
    ),
    Mutation(
        "several voices", "every name is the first voice", "omni/models/speaker.py",
        "self.talker.voice_codes[speakers.index(name)]", "self.talker.voice_codes[0]",
        f"{VOICES}::test_a_voice_by_name_is_that_of_its_codes_and_the_first_is_the_default",
    ),
    Mutation(
        "several voices", "the named voices are not saved", "train_talker.py",
        "talker.voice_codes.copy_(voices.codes)", "pass",
        f"{VOICES}::test_training_knows_the_speakers_and_scores_each",
    ),
    Mutation(
        "several voices", "data without speakers are refused late", "train_talker.py",
        "        check_speakers(run, manifest, config.voice_layers)\n", "",
        f"{VOICES}::test_voices_without_speakers_are_refused_before_anything_is_trained",
    ),
    Mutation(
        "several voices", "the first sentences of a validation may be of one speaker", "omni/stages/voices.py",
        "return rows[np.lexsort((speaker, turn))]", "return rows",
        f"{VOICES}::test_speakers_take_turns",
    ),
    Mutation(
        "several voices", "stage E trains without the speakers", "omni/stages/tasks/spoken_answers.py",
        "if side.processor.talker.voice_layers:", "if False:",
        f"{VOICES}::test_stage_e_and_the_export_keep_the_voices",
    ),
    Mutation(
        "several voices", "silence is a voice", "omni/models/speaker.py",
        "if np.abs(waveform).max() < _SILENT:", "if False:",
        f"{VOICES}::test_one_line_for_a_voice_that_there_is_not",
    ),
    Mutation(
        "several voices", "the page speaks in the first voice alone", "omni/chat/web_voices.py",
        "return speaker.voice(name) if name else None", "return None",
        f"{VOICES}::test_the_page_offers_the_names_and_takes_a_recording",
    ),
    Mutation(
        "the held-out signs stay", "held-out signs are varied as those of training", "omni/synthetic/signs.py",
        "face, rng if varied else None", "face, rng",
        "tests/test_pictures.py::test_training_varies_each_font_and_a_held_out_sign_is_as_its_font_says",
    ),
    Mutation(
        "the held-out signs stay", "held-out signs draw from other words", "omni/synthetic/signs.py",
        "if not unseen and rng.random() < 0.7", "if rng.random() < 0.7",
        "tests/test_pictures.py::test_the_held_out_signs_stay_those_that_earlier_figures_are_of",
    ),
    Mutation(
        "signs in all colours are one", "light letters stay light", "omni/models/ocr.py",
        "keepdim=True) < 0, -away, away)", "keepdim=True) < 0, away, away)",
        "tests/test_ocr.py::test_ink_is_the_same_in_all_colours_and_contrasts",
    ),
    Mutation(
        "the better of two readings", "the columns are not asked", "omni/models/ocr.py",
        "torch.where(better[:, None], spelled, written)", "written",
        "tests/test_ocr.py::test_the_text_with_the_lower_training_loss_is_read",
    ),
    Mutation(
        "Tesseract beside stage G", "a text too few is not noticed", "scripts/tesseract.py",
        "done.returncode or len(texts) != len(files)", "done.returncode",
        "tests/test_tesseract.py::test_a_text_too_few_or_a_failure_ends_it_in_one_line",
    ),
    Mutation(
        "exact resume", "a vocoder keeps its best step when a codec changes what it hears", "omni/train/resume.py",
        "progress.best_step, progress.best_metrics = None, {}", "pass",
        "tests/test_talker.py -k take_up_a_codec",
    ),
    Mutation(
        "foreign formats", "a folder with tables is refused without their names", "omni/data/formats/folders.py",
        'tables = [file for file in tables if file.with_suffix("") not in media and file.stem not in _NO_ROWS]',
        "tables = []",
        "tests/test_formats.py::test_a_folder_of_common_voice_is_refused_with_its_tables",
    ),
    Mutation(
        "foreign formats", "rows of several files look for theirs beside the first", "omni/data/manifest.py",
        "return self.parts[row[PART]].file(row, column, root)", "return self.parts[0].file(row, column, root)",
        "tests/test_formats.py -k one_data_set",
    ),
    Mutation(
        "foreign formats", "a part of a recording lasts to its end", "omni/data/sound_files.py",
        "stop = sound.frames if clip.end_s is None else round(clip.end_s * sound.rate)", "stop = sound.frames",
        "tests/test_formats.py -k 'media_fragments or segments'",
    ),
    Mutation(
        "foreign formats", "a part of a file that cannot be entered begins at its start", "omni/data/sound_files.py",
        "block[max(0, first - begin) : None", "block[0 : None", "tests/test_formats.py -k compressed_recording",
    ),
    Mutation(
        "foreign formats", "a changed file is gathered where a running training reads", "omni/data/open_manifest.py",
        "form.version, stat]", "form.version]", "tests/test_formats.py -k what_it_began_with",
    ),
    Mutation(
        "foreign formats", "what is gathered beside the data is gathered again", "omni/data/open_manifest.py",
        "if beside != folder and why_stale(path, beside, **how) is None:", "if False:",
        "tests/test_formats.py -k share_the_copies",
    ),
    Mutation(
        "foreign formats", "pictures in an archive are looked for in image_root", "omni/data/manifest.py",
        'if str(row[column]).startswith(f"{name}#"):', "if False:",
        "tests/test_formats.py -k 'foreign_format_of_pictures and Parquet'",
    ),
    Mutation(
        "foreign formats", "altered rows in the index are read", "omni/data/index.py",
        "if not is_as_written(folder / name, expected, always=name == ROWS):", "if False:",
        "tests/test_formats.py -k gathered_anew",
    ),
    Mutation(
        "foreign formats", "names without their folder are not found", "omni/data/named_files.py",
        "if root is None and not problem and (path := _where_data_sets_have_it(folders[0], _plain(name))):",
        "if False:", "tests/test_formats.py -k 'Common or LJSpeech'",
    ),
    Mutation(
        "foreign formats", "quotation marks count between tabs", "omni/data/formats/csv_rows.py",
        '_UNQUOTED = ("\\t", "|")', '_UNQUOTED = ("|",)', "tests/test_formats.py -k quotation",
    ),
    Mutation(
        "hostile input", "a command in wav.scp is a file name", "omni/data/formats/folders.py",
        'if file.endswith("|"):', "if False:", "tests/test_formats.py -k cannot_be_read",
    ),
    Mutation(
        "fair scores", "a mirrored picture keeps its caption", "omni/stages/captions.py",
        "image.flip(-1), exchange_sides(caption)", "image.flip(-1), caption", "tests/test_vision.py -k mirrored",
    ),
    Mutation(
        "no wait on a GPU", "the quantiser compacts its rows on every device", "omni/models/quantizer.py",
        'if residual.device.type == "cpu":', "if True:", f"{COUNTS}::test_no_step_waits_for_the_gpu -k codec",
    ),
    Mutation(
        "no wait on a GPU", "the talker's rotary tables are made in every step", "omni/models/talker.py",
        "if n_frames > _ROPE_FRAMES:", "if True:", f"{COUNTS}::test_no_step_waits_for_the_gpu -k talker",
    ),
    Mutation(
        "no wait on a GPU", "latents that do not count are drawn", "omni/models/quantizer.py",
        "rank = active.cumsum(dim=0)", "rank = torch.ones_like(active).cumsum(dim=0)",
        f"{COUNTS} -k the_quantiser_counts",
    ),
    Mutation(
        "few kernels on a GPU", "CTC copies its shifted states", "omni/models/ctc.py",
        "near = torch.logaddexp(near, before[:, :-2] + skip)",
        "near = torch.logaddexp(near, before[:, :-2].clone() + skip)", f"{COUNTS} -k few_kernels",
    ),
    Mutation(
        "few kernels on a GPU", "a path may not skip a blank", "omni/models/ctc.py",
        "skip[:, 3::2].masked_fill_(", "skip[:, 3::2].masked_fill(", f"{COUNTS} -k forward_variables",
    ),
    Mutation(
        "few kernels on a GPU", "rows are gathered value by value", "omni/models/ops.py",
        "return x.reshape(B * T, D).index_select(0, (first + index).flatten()).view(B, -1, D)",
        "return x.gather(1, index[..., None].expand(-1, -1, D))", f"{COUNTS} -k 'sorts and talker'",
    ),
    Mutation(
        "few kernels on a GPU", "logits at all positions", "omni/models/thinker.py",
        "if target_at is not None:", "if False:", f"{COUNTS} -k logits_and_the_last_mlp",
    ),
    Mutation(
        "numerics", "a skipped update of Muon's moves its average on a GPU", "omni/train/optim.py",
        "torch.where(keep > 0, new, old)", "new", "tests/test_optim.py -k changes_nothing",
    ),
    Mutation(
        "numerics", "a skipped update of Muon's moves its average", "omni/train/optim.py",
        "                if not keep:\n", "                if False:\n", "tests/test_optim.py -k changes_nothing",
    ),
    Mutation(
        "speed", "the last MLP computes at all positions", "omni/models/thinker.py",
        "at if early and block is self.layers[-1] else None", "None", "tests/test_thinker.py -k last_mlp_are",
    ),
    Mutation(
        "speed", "oneDNN builds kernels that it has had", "omni/train/run.py",
        "            keep_kernels()", "            pass", "tests/test_environment.py -k kernels",
    ),
    Mutation(
        "few kernels on a GPU", "stage E does not name its targets", "omni/models/omni_model.py",
        'target_at = None if self.device.type == "cpu" else batch["target_at"]', "target_at = None",
        f"{COUNTS} -k names_its_targets",
    ),
    Mutation(
        "few kernels on a GPU", "targets stay where dropped positions were", "omni/models/omni_model.py",
        "place = kept.cumsum(dim=1) - 1 +", "place = torch.ones_like(kept).cumsum(dim=1) - 1 +",
        f"{COUNTS} -k have_moved",
    ),
]  # fmt: skip


def copy_of_the_tree(folder: Path) -> None:
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, folder / path.name)


def failures(mutation: Mutation, trees: queue.SimpleQueue[Path]) -> list[str]:
    """Apply it to a free tree, run its tests until one fails, and undo it.

    Returns:
        The tests that failed; none if nothing noticed it.
    """
    tree = trees.get()
    path = tree / mutation.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    result = pytest(tree, "-x", "-rfE", *shlex.split(mutation.tests))
    path.write_text(text, encoding="utf-8")
    trees.put(tree)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S*?::.*?)(?: - .*)?$", result.stdout, re.MULTILINE)
    if result.returncode not in (0, 1) or (result.returncode == 1 and not failed):
        print(f"error: {mutation.what}: pytest ended with {result.returncode}\n{result.stdout}", flush=True)
    print(f"{mutation.promise}: {mutation.what}: {', '.join(failed) or 'NOT NOTICED'}", flush=True)
    return failed


def pytest(tree: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True)


def fail_anyway(tests: set[str], tree: Path) -> set[str]:
    """Those of the tests that fail in a tree in which nothing is switched off: they have noticed nothing."""
    if not tests:
        return set()
    result = pytest(tree, "-rfE", "-n", str(TOGETHER), *sorted(tests))
    failed = set(re.findall(r"^(?:FAILED|ERROR) (\S*?::.*?)(?: - .*)?$", result.stdout, re.MULTILINE))
    if result.returncode not in (0, 1) or (result.returncode == 1 and not failed):
        sys.exit(f"error: pytest ended with {result.returncode}\n{result.stdout}")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", default="", help="those whose promise or description has this in it")
    parser.add_argument("--page", metavar="FILE.md", type=Path, help="write the table to it")
    args = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if args.only in mutation.promise + mutation.what]
    if not chosen:
        sys.exit(f"error: --only {args.only}: expected a part of a promise or description, found in none")
    for mutation in chosen:
        if (count := (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old)) != 1:
            sys.exit(f"error: {mutation.file}: expected once, found {count} times: {mutation.old}")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(TOGETHER) as pool:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(TOGETHER):
            tree = Path(folder) / str(number)
            tree.mkdir()
            copy_of_the_tree(tree)
            trees.put(tree)
        failed = list(pool.map(lambda mutation: failures(mutation, trees), chosen))
        spoilt = fail_anyway({test for tests in failed for test in tests}, tree)
    for test in sorted(spoilt):
        print(f"error: {test} fails also with nothing switched off", flush=True)
    lines = [
        "# What was switched off, and which tests noticed",
        "",
        f"`python tests/mutations.py`, {time.strftime('%Y-%m-%d')}, commit {commit()}, {machine()}. Of the tests that "
        "notice, the first one is named.",
        "",
        "| promise | switched off | in | noticed by |",
        "| --- | --- | --- | --- |",
    ]
    unnoticed = 0
    for mutation, tests in zip(chosen, failed, strict=True):
        names = list(dict.fromkeys(re.split(r"[\[ ]", test.split("::")[-1])[0] for test in tests if test not in spoilt))
        unnoticed += not names
        by = ", ".join(names) or "**no test**"
        lines.append(f"| {mutation.promise} | {mutation.what} | {mutation.file} | {by} |")
    print(f"{len(chosen) - unnoticed} of {len(chosen)} noticed")
    if args.page:
        args.page.write_text("\n".join([*lines, ""]), encoding="utf-8")
    sys.exit(1 if unnoticed else 0)


if __name__ == "__main__":
    main()
