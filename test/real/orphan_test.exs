defmodule VLLM.Real.OrphanTest do
  # Nothing of the real engine, with all its processes, outlives what it depends
  # on; test/vllm/orphan_test.exs has all the ways with the fake worker.
  use ExUnit.Case

  import VLLM.OSProcess
  import VLLM.SecondBeam

  alias VLLM.{DemoModel, FakeEngine}

  @moduletag :slow
  @moduletag timeout: 600_000

  # It is not to come back: what is left is looked for.
  @options Keyword.merge(DemoModel.options(),
             name: Orphan,
             model: DemoModel.path(),
             max_restarts: 0,
             shutdown_timeout: 0
           )

  describe "the BEAM killed" do
    # This is the worst of its kind: the worker cannot react, and its children
    # are in sessions of their own.
    test "while serving, with the worker stopped by SIGSTOP" do
      beam = start()
      bring_to(beam, :serving)
      assert signal("STOP", worker(beam))
      told(kill(beam, beam.os_pid), "the BEAM, the worker stopped")
    end

    test "three times at random moments" do
      # Delays come from the seed that ExUnit prints. Loading takes seconds.
      for {moment, delay} <- [loading: 9_000, idle: 300, serving: 300] do
        delay = :rand.uniform(delay)
        beam = start()
        bring_to(beam, moment)
        Process.sleep(delay)
        told(kill(beam, beam.os_pid), "the BEAM, #{delay} ms after it was #{moment}")
      end
    end

    test "together with the guard, while serving" do
      beam = start()
      bring_to(beam, :serving)
      guard = guard(beam)
      # It is not to be faster.
      assert signal("STOP", guard)
      assert signal("KILL", beam.os_pid)
      told(kill(beam, guard), "the BEAM and the guard")
    end
  end

  # One after another, since each new BEAM has a nursery to start.
  test "a guard or a worker that is killed, loading or serving, and a load that fails, in a BEAM that lives" do
    beam = start()

    for {who, moment} <- [guard: :loading, guard: :serving, worker: :loading, worker: :serving] do
      bring_to(beam, moment)
      assert eventually(fn -> worker(beam) != nil end, 120_000)
      victim = if who == :guard, do: guard(beam), else: worker(beam)
      told(kill(beam, victim, :lives), "the #{who}, while #{moment}")
      call(beam, "Supervisor.stop(Orphan.Supervisor)")
    end

    # vLLM finds out in a child process: no cache fits into a page.
    start_engine(beam, kv_cache_memory_bytes: 4096)
    call(beam, "{:error, _} = VLLM.await_ready(Orphan, 300_000)")
    told(gone_after(beam, now(), :lives), "a load that failed")
  end

  defp bring_to(beam, moment) do
    start_engine(beam, [])

    if moment != :loading, do: call(beam, ":ok = VLLM.await_ready(Orphan, 300_000)")

    if moment == :serving do
      cast(beam, """
      spawn(fn ->
        Orphan
        |> VLLM.stream("Count:", max_tokens: 900, ignore_eos: true)
        |> Enum.each(fn {:ok, _delta} -> IO.puts("serving") end)
      end)
      """)

      await(beam, "serving")
    end
  end

  defp start_engine(beam, options) do
    child = {VLLM, Keyword.merge(@options, options)}

    call(beam, """
    options = [strategy: :one_for_one, name: Orphan.Supervisor]
    {:ok, _} = Supervisor.start_link([#{inspect(child)}], options)
    """)
  end

  # Nil until there is one.
  defp worker(beam) do
    if guard = guard(beam), do: FakeEngine.worker_pid(guard)
  end

  defp kill(beam, pid, beam_is \\ :gone) do
    since = now()
    assert signal("KILL", pid)
    gone_after(beam, since, beam_is)
  end

  defp now, do: System.monotonic_time(:millisecond)

  # The figures of guides/reliability.md.
  defp told(milliseconds, what) do
    IO.puts("\n#{what}: all was gone after #{milliseconds} ms")
  end
end
