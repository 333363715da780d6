defmodule VLLM.Job.FinetuneTest do
  # Jobs that train, with steps that are made up; test/real/lora_test.exs has the real ones.
  use ExUnit.Case, async: false

  import VLLM.FakeJobs
  import VLLM.OSProcess

  alias VLLM.{Error, Job}
  alias VLLM.Job.{Output, Progress}

  @moduletag :tmp_dir
  setup :folders

  test "an adapter is trained, merged, and has its place and its name", %{model: model} do
    job = finetune!(model, "tickets", merge: true, r: 8)
    assert %Job{kind: :finetune, name: "tickets", source: ^model} = job
    assert {:ok, [%Output{} = adapter, %Output{} = merged]} = Job.await(job)
    assert {adapter.name, adapter.format, adapter.state} == {"tickets", "adapter", :done}
    assert {merged.name, merged.format, merged.state} == {"tickets-merged", "plain", :done}
    assert adapter.options == %{"merge" => true, "r" => 8}
    assert adapter.figures["held_out_loss"] == %{"before" => 7.5, "after" => 0.25}
    assert models() == ["tickets/adapter", "tickets/merged"]
    assert left(job) == []
    # By the fake job, which says what it is to draw.
    python = Keyword.fetch!(worker(), :python)

    assert Job.plot!(job, python: python, format: :png) ==
             "png Loss of tickets over the steps of its training training held out"

    assert {:error, %Error{reason: :python_not_found}} = Job.plot(job, python: "/no/python")

    assert for("== " <> step <- Job.logs!(job), do: step) ==
             [
               "names",
               "pull",
               "look",
               "check",
               "train adapter",
               "publish adapter",
               "register adapter"
             ] ++
               ["merge merged", "publish merged", "register merged"]
  end

  test "what is wrong is told before a download", %{folder: folder} do
    loaded = Path.join(folder, "loaded")
    job = finetune!("touch:#{loaded}", "no", check: "refuse:unsupported_quantization")
    assert {:error, %Error{reason: :unsupported_quantization}} = Job.await(job)
    refute File.exists?(loaded)

    for {data, options, text} <- [
          {[], [to: "../up"], "cannot be called"},
          {[], [], "cannot be called"},
          {3, [to: "a"], "`data` must be a list of records, or the path"},
          {[self()], [to: "a"], "`data`"}
        ] do
      assert {:error, %Error{reason: :invalid_option} = error} = Job.finetune("m", data, options)

      assert error.message =~ text
    end
  end

  test "a name that is taken, or being made, is not taken again", %{model: model} do
    job = finetune!(model, "taken", train: "wait:/nowhere")
    assert {:error, %Error{reason: :name_taken} = error} = finetune(model, "taken")
    assert error.details["job"] == job.id
    assert {:error, %Error{reason: :name_taken}} = quantize(model, [:a], name: "taken")
    Job.cancel!(job)

    assert {:ok, [_]} = Job.await(finetune!(model, "taken"))
    assert {:error, %Error{reason: :name_taken} = error} = Job.await(finetune!(model, "taken"))
    assert error.message =~ "The name `taken` is "
    assert models() == ["taken/adapter"]
  end

  test "one that is cancelled leaves nothing running, and a retry goes on from its states",
       %{model: model, folder: folder} do
    reached = Path.join(folder, "reached")
    job = finetune!(model, "again", train: "tell:1:2;child;once:#{reached}:wait:/nowhere")
    ref = Job.subscribe!(job)
    assert_receive {^ref, %Progress{state: :training, done: 1, figures: %{"loss" => 0.5}}}, 60_000
    assert eventually(fn -> File.exists?(reached) end, 60_000)
    assert Job.cancel(job) == :ok
    assert descendants(VLLM.Footprint.beam()) |> Enum.filter(&(command(&1) =~ "fake_job")) == []
    assert_receive {^ref, %Progress{state: :cancelled, error: %Error{reason: :aborted}}}
    assert models() == []
    assert left(job) == ["keep"]

    assert {:ok, %Job{state: :queued}} = Job.retry(job)
    assert {:ok, [%Output{figures: %{"resumed_from" => 1}}]} = Job.await(job)
    assert left(job) == []
  end

  test "a training that lacks memory is told what a training needs less with", %{model: model} do
    {_available, total} = VLLM.Job.Machine.memory()
    never = finetune!(model, "large", memory: 2 * total)
    assert {:error, %Error{reason: :out_of_memory} = error} = Job.await(never)

    # Which the system has done for want of memory, likely.
    killed = finetune!(model, "killed", train: "exit:137")
    assert {:error, %Error{reason: :step_died} = died} = Job.await(killed)

    for %{message: message} <- [error, died] do
      assert message =~ "`load_in_4bit: true`" and message =~ "`VLLM.Job.estimate/3`"
      refute message =~ "format"
    end
  end

  test "a source that changed is not gone on with", %{model: model, folder: folder} do
    job = finetune!(model, "moved", train: "once:#{folder}/died:exit:3")
    assert {:error, %Error{reason: :step_died}} = Job.await(job)
    File.write!(Path.join(model, "config.json"), "[1]")
    assert {:ok, _} = Job.retry(job)
    assert {:error, %Error{reason: :source_changed}} = Job.await(job)
  end
end
