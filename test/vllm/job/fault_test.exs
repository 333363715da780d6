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

    # Making and verifying.
    for step <- [:quantize, :measure] do
      job = stopping(model, folder, step)
      # Another waits for it.
      queued = quantize!(model, [:b], name: "queued")
      assert Job.cancel(queued) == :ok
      assert %{state: :cancelled, outputs: []} = Job.get!(queued)
      assert %{outputs: [%{state: state}]} = cancelled(job)
      assert state != :done
      File.rm!(Path.join(folder, "reached"))
    end

    # Over.
    job = quantize!(model, [:a], name: "over", verify: false)
    assert {:ok, [_]} = Job.await(job)
    assert Job.cancel(job) == :ok
    assert Job.get!(job).state == :done
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
    assert Enum.map(Job.get!(job).outputs, & &1.state) == [:quantizing, :waiting]
    assert gone?(job)

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

    File.write!(Path.join(model, "config.json"), "{}")
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
