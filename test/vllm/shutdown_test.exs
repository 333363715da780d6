defmodule VLLM.ShutdownTest do
  # Ends of an engine, wanted and unwanted, and what is left then: by the fake
  # worker under the real guard.
  use ExUnit.Case, async: true

  import VLLM.FakeEngine
  import VLLM.OSProcess

  alias VLLM.Bridge.Program
  alias VLLM.Engine.Table
  alias VLLM.Error

  @moduletag :tmp_dir

  defp in_background(name, operation) do
    test = self()
    spawn(fn -> send(test, {name, operation.()}) end)
  end

  defp stopping?(llm) do
    case Table.lookup(llm) do
      {:ok, table, _pid} -> Table.stopping?(table)
      {:error, _} -> true
    end
  end

  describe "stop" do
    test "lets requests in flight finish and takes no other", %{tmp_dir: dir} do
      llm = start!("ready", shutdown_timeout: 60_000, replicas: 2)
      for n <- 1..6, do: ask_in_background(llm, "wait:#{dir}/go", session: n)
      assert eventually(fn -> in_flight(llm) == 6 end)
      programs = for {_, program} <- workers(llm), do: program
      in_background(:stopped, fn -> VLLM.stop(llm) end)
      assert eventually(fn -> stopping?(llm) end)
      assert eventually(fn -> match?({:error, %{reason: :not_running}}, ask(llm, "reply:x")) end)
      refute_received {:answer, _}
      File.touch!(Path.join(dir, "go"))
      for _ <- 1..6, do: assert_receive({:answer, {:ok, "waited"}}, 30_000)
      assert_receive {:stopped, :ok}, 30_000

      for program <- programs do
        refute alive?(program.os_pid)
        refute File.exists?(program.run_dir)
      end
    end

    test "ends what takes longer than shutdown_timeout with :shutdown" do
      for timeout <- [0, 300] do
        llm = start!("ready", shutdown_timeout: timeout)
        ask_in_background(llm, "hold")
        await_held(llm, 1)
        assert :ok = VLLM.stop(llm)
        assert_receive {:answer, {:error, %Error{reason: :shutdown}}}
      end
    end

    test "has those who wait for a starting engine told" do
      start_supervised!({VLLM.FakeEngine, name: NeverReady, model: "hang"})
      in_background(:awaited, fn -> VLLM.await_ready(NeverReady) end)
      ask_in_background(NeverReady, "reply:x")
      assert eventually(fn -> match?([{_, %{}}], workers(NeverReady)) end)
      assert :ok = VLLM.stop(NeverReady)
      assert_receive {:awaited, {:error, %Error{reason: :not_running}}}
      assert_receive {:answer, {:error, %Error{reason: reason}}}
      assert reason in [:not_running, :shutdown]
    end

    test "waits for no operation on the replicas", %{tmp_dir: dir} do
      llm = start!("ready", shutdown_timeout: 0)
      ask_in_background(llm, "wait:#{dir}/go")
      assert eventually(fn -> in_flight(llm) == 1 end)
      in_background(:drained, fn -> VLLM.drain(llm, 1) end)
      assert eventually(fn -> match?([%{state: :draining}], VLLM.replicas!(llm)) end)
      in_background(:scaled, fn -> VLLM.scale(llm, 2) end)
      assert :ok = VLLM.stop(llm)
      assert_receive {:answer, {:error, %Error{reason: :shutdown}}}
      assert_receive {:drained, {:error, %Error{reason: :not_running}}}
      assert_receive {:scaled, {:error, %Error{reason: :not_running}}}
    end

    test "tells those who wait for an operation before the replicas end", %{tmp_dir: dir} do
      llm = start!("ready", shutdown_timeout: 60_000)
      ask_in_background(llm, "wait:#{dir}/go")
      assert eventually(fn -> in_flight(llm) == 1 end)
      in_background(:drained, fn -> VLLM.drain(llm, 1) end)
      assert eventually(fn -> match?([%{state: :draining}], VLLM.replicas!(llm)) end)
      in_background(:scaled, fn -> VLLM.scale(llm, 2) end)
      in_background(:stopped, fn -> VLLM.stop(llm) end)
      assert_receive {:drained, {:error, %Error{reason: :not_running}}}, 30_000
      assert_receive {:scaled, {:error, %Error{reason: :not_running}}}, 30_000
      refute_received {:answer, _}
      File.touch!(Path.join(dir, "go"))
      assert_receive {:answer, {:ok, "waited"}}, 30_000
      assert_receive {:stopped, :ok}, 30_000
    end
  end

  test "a supervisor's shutdown is as graceful", %{tmp_dir: dir} do
    engine = {VLLM.FakeEngine, name: Graceful, model: "ready", shutdown_timeout: 60_000}
    {:ok, supervisor} = Supervisor.start_link([engine], strategy: :one_for_one)
    assert :ok = VLLM.await_ready(Graceful)
    ask_in_background(Graceful, "wait:#{dir}/go")
    assert eventually(fn -> in_flight(Graceful) == 1 end)
    in_background(:stopped, fn -> Supervisor.stop(supervisor) end)
    assert eventually(fn -> stopping?(Graceful) end)
    File.touch!(Path.join(dir, "go"))
    assert_receive {:answer, {:ok, "waited"}}, 30_000
    assert_receive {:stopped, :ok}, 30_000
  end

  test "the owner's end stops an engine with nothing in flight at once" do
    test = self()

    owner =
      spawn(fn ->
        llm = start!("ready", shutdown_timeout: 600_000)
        {:ok, _table, pid} = Table.lookup(llm)
        send(test, {:started, pid, workers(llm)})
        Process.sleep(:infinity)
      end)

    assert_receive {:started, pid, [{_, program}]}, 30_000
    monitor = Process.monitor(pid)
    Process.exit(owner, :kill)
    assert_receive {:DOWN, ^monitor, :process, _, _}, 20_000
    refute alive?(program.os_pid)
  end

  test "a guard that was stopped is made to end its run" do
    llm = start!()
    [{_, program}] = workers(llm)
    fake = worker_pid(program)
    assert signal("STOP", program.os_pid)
    assert :ok = VLLM.stop(llm)
    refute alive?(program.os_pid)
    refute alive?(fake)
    refute File.exists?(program.run_dir)
  end

  describe "a death" do
    test "is noticed at once though a child in a session of its own holds the pipe" do
      llm = start!()
      {:ok, child} = ask(llm, "child")
      child = String.to_integer(child)
      assert File.read_link!("/proc/#{child}/fd/4") =~ "pipe:"
      ask_in_background(llm, "print:goodbye;hold")
      await_held(llm, 1)
      [{_, program}] = workers(llm)
      assert signal("KILL", worker_pid(program))

      # The child would hold it for ever; bench/reliability.exs says how many milliseconds it takes.
      assert_receive {:answer, {:error, %Error{reason: :engine_dead} = error}}, 30_000
      assert "goodbye" in error.details["log"]
      refute alive?(child)
    end

    test "while loading is noticed at any point of it" do
      for model <- ["exit:3", "print:x;kill", "garbage", "sleep:0.2;exit:0", "refuse:engine_dead"] do
        assert {:error, %Error{reason: :failed} = error} = start(model, max_restarts: 0)
        assert error.details["reason"] in ["engine_dead", "protocol"]
      end
    end
  end

  describe "a process of ours that is killed" do
    test "leaves no program of its own, and a worker begins anew" do
      llm = start!()
      [{worker, program}] = workers(llm)
      ask_in_background(llm, "hold")
      await_held(llm, 1)
      Process.exit(worker, :kill)
      assert_receive {:answer, {:error, %Error{reason: :engine_dead}}}
      assert eventually(fn -> ask(llm, "reply:x") == {:ok, "x"} end)
      refute alive?(program.os_pid)
      refute File.exists?(program.run_dir)
      assert [{_, %{os_pid: new}}] = workers(llm)
      assert new != program.os_pid
    end

    test "does not take the engine with it, if it is the control process", %{tmp_dir: dir} do
      llm = start!()
      {:ok, table, _} = Table.lookup(llm)
      {:ok, control} = Table.control(table)
      ask_in_background(llm, "wait:#{dir}/go")
      assert eventually(fn -> in_flight(llm) == 1 end)
      in_background(:drained, fn -> VLLM.drain(llm, 1) end)
      assert eventually(fn -> match?([%{state: :draining}], VLLM.replicas!(llm)) end)
      # What waits for it asks its successor.
      ask_in_background(llm, "reply:x")
      in_background(:awaited, fn -> VLLM.await_ready(llm, 60_000) end)
      Process.exit(control, :kill)
      File.touch!(Path.join(dir, "go"))
      assert_receive {:answer, {:ok, "waited"}}, 30_000
      assert_receive {:drained, :ok}, 30_000
      assert_receive {:answer, {:error, %Error{reason: :not_running}}}, 30_000
      assert_receive {:awaited, {:error, %Error{reason: :not_running}}}, 30_000
      assert :ok = VLLM.restart(llm)
      assert {:ok, "x"} = ask(llm, "reply:x")
    end
  end

  describe "a start" do
    test "removes what a power cut left, and lets the living be" do
      living = start!("ready", name: Living)
      [{_, %{run_dir: kept}}] = workers(living)

      # A run whose guard is gone: folder, process, shared memory. The lock comes last, for a
      # sweep may go on already; and it is the oldest, as in a run.
      left = Path.join(Program.base_dir(), "left-#{System.unique_integer([:positive])}")
      File.mkdir_p!(Path.join(left, "tmp"))
      File.write!(Path.join(left, "draft"), "vllm_bridge 1\n")
      File.write!(Path.join(left, "log"), "last words\n")
      segment = "/dev/shm/psm_#{System.unique_integer([:positive])}_ex_vllm_test"

      orphan =
        Port.open({:spawn_executable, System.find_executable("sleep")}, [
          :nouse_stdio,
          args: ["600"],
          env: [{'EX_VLLM_RUN', String.to_charlist(left)}]
        ])

      {:os_pid, orphan} = Port.info(orphan, :os_pid)
      # Until it is what it is to be, it has no sign of that run.
      assert eventually(fn -> command(orphan) =~ "sleep" end, 30_000)
      File.write!(segment, "x")
      on_exit(fn -> for path <- [left, segment], do: File.rm_rf!(path) end)
      File.rename!(Path.join(left, "draft"), Path.join(left, "lock"))

      # Not held up by it.
      llm = start!()
      assert {:ok, "x"} = ask(llm, "reply:x")
      assert eventually(fn -> not File.exists?(left) end, 30_000)
      refute alive?(orphan)
      refute File.exists?(segment)
      assert File.dir?(kept)
      assert {:ok, "still here"} = ask(Living, "reply:still here")
    end
  end
end
