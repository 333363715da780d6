defmodule VLLM.Job.FaultTest do
  # Whatever happens to a job: nothing hangs, nothing half is listed, nothing is left, and a retry
  # ends well.
  use ExUnit.Case, async: false

  import VLLM.FakeJobs
  import VLLM.OSProcess

  alias VLLM.{Error, Footprint, Job, SecondBeam}
  alias VLLM.Job.{Progress, Queue}

  @moduletag :tmp_dir
  setup :folders

  # The processes of steps of this BEAM, without their guards.
  defp workers do
    for pid <- descendants(Footprint.beam()), command(pid) =~ "fake_job.py", do: pid
  end

  defp gone?(job) do
    eventually(fn -> workers() == [] end, 30_000) and left(job) == []
  end

  # One that stops in a step once, and goes on in a retry.
  defp stopping(model, folder, step, more \\ []) do
    reached = Path.join(folder, "reached")
    script = "child;once:#{reached}:wait:/nowhere"
    job = quantize!(model, [{:a, [{step, script}]}], [name: "stopping"] ++ more)
    assert eventually(fn -> File.exists?(reached) end, 60_000)
    job
  end

  defp ends_well(job) do
    assert {:ok, _} = Job.retry(job)
    assert {:ok, [%{state: :done, path: path}]} = Job.await(job)
    assert File.exists?(Path.join(path, "model"))
    assert gone?(job)
  end

  for step <- [:quantize, :measure, :register] do
    if step != :quantize, do: @tag(:slow)

    test "a step that is killed while it #{step}s is told, with its last lines, and is retried",
         %{model: model, folder: folder} do
      job = stopping(model, folder, unquote(step))
      for pid <- workers(), command(pid) =~ ~r/job\0$|tools\0$/, do: signal("KILL", pid)
      assert {:error, %Error{reason: :step_died} = error} = Job.await(job)
      assert error.message =~ "step `#{unquote(step)}` was killed by signal 9"
      # What it likely was, and what to do then.
      assert error.message =~ "want of memory" and error.message =~ "stop engines"
      assert Job.get!(job).state == :failed
      assert gone?(job)
      if unquote(step) != :register, do: assert(models() == [])
      ends_well(job)
    end
  end

  @tag :slow
  test "a step whose guard is killed is an error, and leaves nothing", %{
    model: model,
    folder: folder
  } do
    job = stopping(model, folder, :quantize)
    [guard] = Footprint.guards()
    signal("KILL", guard)
    assert {:error, %Error{reason: :step_died}} = Job.await(job)
    assert gone?(job)
    ends_well(job)
  end

  test "a step that ends by itself shows what it printed last", %{model: model} do
    job = quantize!(model, a: [quantize: "print:Farewell;exit:3"])
    assert {:error, %Error{reason: :step_died} = error} = Job.await(job)
    assert error.message =~ "ended with status 3" and error.message =~ "Farewell"
    assert "Farewell" in error.details["log"]
    assert "Farewell" in Job.logs!(job)
  end

  @tag :slow
  test "a job is cancelled in each of its states", %{model: model, folder: folder} do
    # Downloading.
    loading = Path.join(folder, "loading")
    job = quantize!("touch:#{loading};wait:/nowhere", [:a], name: "loading")
    assert eventually(fn -> File.exists?(loading) end, 60_000)
    assert cancelled(job).state == :cancelled

    # Preparing, making and verifying.
    for step <- [:check, :quantize, :measure] do
      job = stopping(model, folder, step)
      # Another waits for it.
      queued = quantize!(model, [:b], name: "queued")
      assert Job.cancel(queued) == :ok
      assert %{state: :cancelled, outputs: []} = Job.get!(queued)
      refute Enum.any?(cancelled(job).outputs, &(&1.state == :done))
      File.rm!(Path.join(folder, "reached"))
    end

    # Over.
    job = quantize!(model, [:a], name: "over", verify: false)
    assert {:ok, [_]} = Job.await(job)
    assert Job.cancel(job) == :ok
    assert Job.get!(job).state == :done

    job = quantize!(model, [a: [check: "refuse:unsupported"]], name: "failed")
    assert {:error, %Error{reason: :unsupported}} = Job.await(job)
    assert Job.cancel(job) == :ok
    assert Job.get!(job).state == :failed
  end

  defp cancelled(job) do
    ref = Job.subscribe!(job)
    assert Job.cancel(job) == :ok
    # Nothing of it runs when that returns.
    assert workers() == []
    assert left(job) == []
    assert_receive {^ref, %Progress{state: :cancelled, error: %Error{reason: :aborted}}}
    assert models() == []
    Job.get!(job)
  end

  @tag :slow
  test "a disk that fills up ends the job and says so", %{model: model, folder: folder} do
    job = quantize!(model, a: [quantize: "refuse:disk_full"], b: [])
    assert {:error, %Error{reason: :disk_full}} = Job.await(job)
    # There is no room for the others, either.
    assert %{state: :failed, outputs: [a, b]} = Job.get!(job)
    assert {a.state, b.state} == {:quantizing, :waiting}
    assert gone?(job)
    assert models() == []

    # What is needed is not there, before it begins; and what is there is gone while it runs.
    free = Path.join(folder, "free")
    File.write!(free, "1000000")
    df = Path.join(folder, "df")
    File.write!(df, "#!/bin/sh\necho Title\necho disk 9 9 $(cat #{free}) 9% /\n")
    File.chmod!(df, 0o755)
    VLLM.SystemEnv.put_env("PATH", folder <> ":" <> System.get_env("PATH"))

    job = quantize!(model, [a: [disk: 2_000_000_000]], name: "large")
    assert {:error, %Error{reason: :disk_full} = error} = Job.await(job)
    assert error.message =~ "has 1.0 GB left"

    job = stopping(model, folder, :quantize)
    File.write!(free, "10")
    assert {:error, %Error{reason: :disk_full}} = Job.await(job)
    assert gone?(job)
    File.write!(free, "1000000")
    ends_well(job)
  end

  @tag :slow
  test "a source that changes meanwhile ends the job, and outputs of two sources are not mixed",
       %{model: model, folder: folder} do
    go = Path.join(folder, "go")
    job = quantize!(model, [a: [], b: [quantize: "touch:#{folder}/b;wait:#{go}"]], name: "mixed")
    assert eventually(fn -> File.exists?(folder <> "/b") end, 60_000)
    File.write!(Path.join(model, "config.json"), "[1]")
    File.touch!(go)
    assert {:error, %Error{reason: :source_changed}} = Job.await(job)
    assert models() == ["mixed/a"]
    assert {:ok, _} = Job.retry(job)
    assert {:error, %Error{reason: :source_changed}} = Job.await(job)
    assert gone?(job)

    # It may be gone altogether.
    File.rm!(go)
    job = quantize!(model, [a: [quantize: "touch:#{folder}/c;wait:#{go}"]], name: "alone")
    assert eventually(fn -> File.exists?(folder <> "/c") end, 60_000)
    File.rename!(model, model <> "-away")
    File.touch!(go)
    assert {:error, %Error{reason: :source_changed}} = Job.await(job)
    assert gone?(job)
    assert models() == ["mixed/a"]
    File.rename!(model <> "-away", model)
    ends_well(job)
  end

  test "a source that is damaged is told before anything is made, and a retry takes a whole one",
       %{model: model, folder: folder} do
    damaged = "once:#{folder}/damaged:refuse:invalid_checkpoint"
    job = quantize!(model, a: [check: damaged])
    assert {:error, %Error{reason: :invalid_checkpoint}} = Job.await(job)
    assert %{state: :failed, outputs: []} = Job.get!(job)
    assert gone?(job)
    assert models() == []
    ends_well(job)
  end

  # One that was cut off when its output had its place, and no name yet.
  defp nameless(model, folder, name) do
    reached = Path.join(folder, name)
    script = "once:#{reached}:wait:/nowhere"
    job = quantize!(model, [a: [register: script]], name: name, verify: false)
    assert eventually(fn -> File.exists?(reached) end, 60_000)
    assert Job.cancel(job) == :ok
    assert %{state: :cancelled, outputs: [%{state: :registering}]} = Job.get!(job)
    assert left(job) == []
    job
  end

  @tag :slow
  test "what was cut off before it had its name gets it by a retry, if it is that job's still",
       %{model: model, folder: folder} do
    job = nameless(model, folder, "own")
    ends_well(job)
    assert Enum.count(Job.logs!(job), &(&1 == "== quantize a")) == 1

    # Another has made it meanwhile: it is not taken for its own, and not deleted with it.
    for name <- ["retried", "deleted"] do
      job = nameless(model, folder, name)
      place = VLLM.Data.model(name, "a")
      File.rm_rf!(place)
      assert {:ok, _} = Job.await(quantize!(model, [:a], name: name, verify: false))

      if name == "retried" do
        assert {:ok, _} = Job.retry(job)
        assert {:error, %Error{reason: :name_taken}} = Job.await(job)
      end

      assert Job.delete(job, outputs: true) == :ok
      assert File.read!(Path.join(place, "model")) == "{}"
    end

    # The model is another now, and this is not made of it.
    job = nameless(model, folder, "older")
    File.write!(Path.join(model, "config.json"), "[1]")
    assert {:ok, _} = Job.retry(job)
    assert {:error, %Error{reason: :source_changed}} = Job.await(job)
    assert Job.delete(job, outputs: true) == :ok
    refute File.exists?(VLLM.Data.model("older", "a"))
  end

  @tag :slow
  test "a runner that is killed leaves its job interrupted and nothing else",
       %{model: model, folder: folder} do
    job = stopping(model, folder, :quantize)
    [{_, runner, _, _}] = DynamicSupervisor.which_children(VLLM.Job.RunnerSupervisor)
    Process.exit(runner, :kill)
    assert {:error, %Error{reason: :job_interrupted}} = Job.await(job)
    assert gone?(job)
    ends_well(job)
  end

  @tag :slow
  test "a queue that crashes takes the jobs along, and the application goes on",
       %{model: model, folder: folder} do
    job = stopping(model, folder, :quantize)
    queue = Process.whereis(Queue)
    waiting = Task.async(fn -> Job.await(job) end)
    assert eventually(fn -> map_size(:sys.get_state(queue).subscribers) == 1 end)
    Process.exit(queue, :kill)
    assert {:error, %Error{reason: :job_interrupted}} = Task.await(waiting, 60_000)
    assert eventually(fn -> Process.whereis(Queue) not in [nil, queue] end)
    assert gone?(job)
    ends_well(job)
  end

  @tag :slow
  test "jobs are interrupted when the application stops", %{model: model, folder: folder} do
    job = stopping(model, folder, :quantize)
    queued = quantize!(model, [:b], name: "queued", verify: false)
    ref = Job.subscribe!(job)
    capture = ExUnit.CaptureLog.capture_log(fn -> :ok = Application.stop(:ex_vllm) end)
    assert capture =~ "exited: :stopped"
    assert workers() == []
    assert_received {^ref, %Progress{state: :interrupted}}
    assert {:error, %Error{reason: :not_running}} = Job.cancel(job)
    assert %{state: :interrupted} = Job.get!(queued)
    :ok = Application.start(:ex_vllm)
    assert gone?(job)
    ends_well(job)
    assert {:ok, _} = Job.retry(queued)
    assert {:ok, [_]} = Job.await(queued)
  end

  @tag :slow
  test "a BEAM that is killed leaves its job interrupted, to be swept and retried by the next",
       %{model: model, folder: folder} do
    beam = SecondBeam.start()
    reached = Path.join(folder, "reached")
    data = VLLM.Data.dir()

    SecondBeam.call(beam, """
    Application.put_env(:ex_vllm, :data_dir, #{inspect(data)})
    options = #{inspect(options([a: [quantize: "child;once:#{reached}:wait:/nowhere"]], name: "killed"))}
    {:ok, job} = VLLM.Job.quantize(#{inspect(model)}, options)
    """)

    assert eventually(fn -> File.exists?(reached) end, 60_000)

    # It is seen here, followed, and not taken for one that was cut off.
    assert %Job{state: :quantizing} = job = Enum.find(Job.list(), &(&1.name == "killed"))
    ref = Job.subscribe!(job)
    assert_receive {^ref, %Progress{state: :quantizing}}
    assert {:error, %Error{reason: :job_running}} = Job.retry(job)
    assert {:error, %Error{reason: :name_taken}} = quantize(model, [:a], name: "killed")

    signal("KILL", beam.os_pid)
    SecondBeam.gone_after(beam, System.monotonic_time(:millisecond))
    assert_receive {^ref, %Progress{state: :interrupted}}, 30_000
    assert %{state: :interrupted, error: %Error{reason: :job_interrupted}} = Job.get!(job)
    assert models() == []
    assert left(job) == ["tmp"]
    ends_well(job)
  end

  @tag :slow
  test "of two BEAMs that ask for one name at the same moment, one gets it",
       %{model: model, folder: folder} do
    names = for number <- 1..20, do: "name-#{number}"
    options = options([a: [quantize: "wait:/nowhere"]], verify: false)

    beams =
      for letter <- ["a", "b"] do
        beam = SecondBeam.start()

        SecondBeam.cast(beam, """
        Application.put_env(:ex_vllm, :data_dir, #{inspect(VLLM.Data.dir())})
        # The other is as far.
        together = fn name ->
          File.touch!(Path.join(#{inspect(folder)}, name <> "-#{letter}"))
          wait = fn wait ->
            there = for l <- ["a", "b"], do: File.exists?(Path.join(#{inspect(folder)}, name <> "-" <> l))
            unless Enum.all?(there), do: wait.(wait)
          end
          wait.(wait)
        end

        answers =
          for name <- #{inspect(names)} do
            together.(name)
            case VLLM.Job.quantize(#{inspect(model)}, [name: name] ++ #{inspect(options)}) do
              {:ok, _} -> :ok
              {:error, error} -> error.reason
            end
          end

        File.write!(#{inspect(Path.join(folder, letter))}, :erlang.term_to_binary(answers))
        """)

        beam
      end

    for beam <- beams, do: SecondBeam.await(beam, "done")

    answers =
      for letter <- ["a", "b"],
          do: folder |> Path.join(letter) |> File.read!() |> :erlang.binary_to_term()

    # Nobody is refused for nothing, either.
    assert Enum.map(Enum.zip(answers), &Enum.sort(Tuple.to_list(&1))) ==
             List.duplicate([:name_taken, :ok], 20)

    assert Enum.sort(Enum.map(Job.list(), & &1.name)) == Enum.sort(names)
    for beam <- beams, do: signal("KILL", beam.os_pid)
    for beam <- beams, do: SecondBeam.gone_after(beam, System.monotonic_time(:millisecond))
    assert models() == []
  end

  @tag :slow
  test "a job of another BEAM is cancelled from here", %{model: model, folder: folder} do
    beam = SecondBeam.start()
    reached = Path.join(folder, "reached")

    SecondBeam.call(beam, """
    Application.put_env(:ex_vllm, :data_dir, #{inspect(VLLM.Data.dir())})
    options = #{inspect(options([a: [quantize: "touch:#{reached};wait:/nowhere"]], name: "there"))}
    {:ok, job} = VLLM.Job.quantize(#{inspect(model)}, options)
    """)

    assert eventually(fn -> File.exists?(reached) end, 60_000)
    job = Enum.find(Job.list(), &(&1.name == "there"))
    assert Job.cancel(job) == :ok
    assert %{state: :cancelled} = Job.get!(job)
    assert left(job) == []
  end
end
