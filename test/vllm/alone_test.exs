defmodule VLLM.AloneTest do
  # Faults like those of VLLM.FaultTest that must not be tested beside others: they look at all
  # that there is of the library, or touch what all of the BEAM's programs depend on.
  use ExUnit.Case, async: false

  import VLLM.FakeEngine
  import VLLM.OSProcess

  alias VLLM.{Error, Fuzz}

  test "a refused load is the worker's own error, and nothing is left" do
    assert {:error, %Error{reason: :model_not_found}} = start("refuse:model_not_found")
    # The engine of the test before may take a moment longer than its owner.
    assert eventually(fn -> none_below?(VLLM.EngineSupervisor) end, 60_000)
  end

  test "a death is noticed where the port breaks before the exit status comes" do
    llm = start!()
    [{_worker, program}] = workers(llm)
    fake = worker_pid(program)
    # Who tells the BEAM of exit statuses is stopped until this shell reads a line, or the end.
    beam = String.to_integer(System.pid())
    # What it starts is below it, and looks like it for a moment.
    setups = Enum.filter(descendants(beam), &(command(&1) =~ "erl_child_setup"))
    [setup] = setups -- Enum.flat_map(setups, &descendants/1)
    script = "kill -STOP #{setup}; kill -KILL #{program.os_pid}; read -r _; kill -CONT #{setup}"
    shell = Port.open({:spawn_executable, "/bin/sh"}, [:binary, args: ["-c", script]])
    assert eventually(fn -> not alive?(fake) end)
    ask_in_background(llm, "reply:x")
    assert eventually(fn -> Port.info(program.port) == nil end)
    Port.command(shell, "\n")
    assert_receive {:answer, {:error, %Error{reason: :engine_dead}}}
    assert eventually(fn -> ask(llm, "reply:again") == {:ok, "again"} end)
  end

  test "streams to a process come as messages and end with the output, and nothing is left" do
    llm = start!()
    ref = VLLM.stream_to(llm, "delta:a;delta:b;reply:ab")
    assert_receive {:vllm, ^ref, %VLLM.Delta{text: "a"}}
    assert_receive {:vllm, ^ref, %VLLM.Delta{text: "b"}}
    assert_receive {:vllm, ^ref, {:done, %VLLM.RequestOutput{} = output}}
    assert VLLM.text(output) == "ab"
    ref = VLLM.stream_to(llm, "error:internal")
    assert_receive {:vllm, ^ref, {:error, %Error{reason: :internal}}}
    ref = VLLM.stream_to(llm, "hold", self(), timeout: 200)
    assert_receive {:vllm, ^ref, {:error, %Error{reason: :timeout}}}
    await_held(llm, 0)
    assert eventually(fn -> none_below?(VLLM.StreamSupervisor) end, 60_000)
  end

  test "env: reaches the worker, nil unsets, and the values show nowhere" do
    VLLM.SystemEnv.put_env("VLLM_TEST_INHERITED", "inherited")
    env = %{"VLLM_TEST_SET" => "s3cret", "VLLM_TEST_INHERITED" => nil}
    llm = start!("ready", env: env, name: Secretive)
    assert {:ok, "s3cret"} = ask(llm, "env:VLLM_TEST_SET")
    assert {:ok, ""} = ask(llm, "env:VLLM_TEST_INHERITED")

    {:ok, _table, pid} = VLLM.Engine.Table.lookup(llm)
    [{worker, _}] = workers(llm)
    refute inspect(:sys.get_state(worker), limit: :infinity) =~ "s3cret"
    refute inspect(:sys.get_state(pid), limit: :infinity) =~ "s3cret"
    refute to_string(:io_lib.format("~p", [:sys.get_state(pid)])) =~ "s3cret"
  end

  test "what a worker sends in pieces and never ends is its own affair: the calls reach their deadlines" do
    other = start_other!()
    llm = start!("ready", shutdown_timeout: 100)
    before = resident()
    # A length of 64 MiB, the most that there may be, and a byte.
    assert {:error, %Error{reason: :timeout}} = ask(llm, "raw:0400000094", timeout: 500)
    assert {:error, %Error{reason: :timeout}} = ask(llm, "reply:x", timeout: 500)
    # What it announces is not what it takes: that comes with the bytes.
    assert resident() < before + 50_000
    assert :ok = VLLM.stop(llm)
    assert_unharmed(other)
  end

  # Another engine, with a request in flight that is answered at the end.
  defp start_other! do
    other = start!()
    ask_in_background(other, "hold")
    await_held(other, 1)
    other
  end

  defp assert_unharmed(other) do
    assert {:ok, "released"} = ask(other, "release")
    assert_receive {:answer, {:ok, "released"}}
    refute_received _
  end

  # In kB.
  defp resident do
    [_, kilobytes] = Regex.run(~r/VmRSS:\s+(\d+) kB/, File.read!("/proc/self/status"))
    String.to_integer(kilobytes)
  end

  @tag :slow
  test "hostile frames, one after another, are survived" do
    other = start_other!()
    llm = start!("ready", max_restarts: 1000, max_seconds: 1)
    corpus = Fuzz.corpus(:from_worker)
    atoms = fn -> :erlang.system_info(:atom_count) end
    before = atoms.()

    for _ <- 1..25 do
      frame = corpus |> Fuzz.frame() |> binary_part_of(4_000)

      # The recorded ids are those of requests that are over, or of this one.
      result = ask(llm, "frame:#{Base.encode16(frame, case: :lower)};reply:fine", timeout: 60_000)

      case result do
        {:ok, text} -> assert is_binary(text)
        {:error, %Error{reason: reason}} -> assert reason in [:protocol, :engine_dead, :aborted]
      end
    end

    # Code that is loaded on the way brings some.
    assert atoms.() - before < 500
    assert eventually(fn -> ask(llm, "reply:again") == {:ok, "again"} end, 60_000)
    assert_unharmed(other)
  end

  defp binary_part_of(binary, size), do: binary_part(binary, 0, min(size, byte_size(binary)))
end
