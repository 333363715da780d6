defmodule VLLM.OrphanTest do
  # Nothing of an engine outlives what it depends on, however that ends: no
  # process, segment of shared memory, file or socket. The library runs in a second
  # BEAM, with the fake worker, which makes what is hard to get rid of: children
  # that started sessions of their own, are stopped or ignore SIGTERM, and what they
  # leave in /dev/shm and in the temporary folder. test/real/orphan_test.exs has
  # the same for the real engine.
  use ExUnit.Case, async: true

  import VLLM.OSProcess
  import VLLM.SecondBeam

  @moduletag timeout: 600_000

  @fake Path.expand("../support/fake_python", __DIR__)

  # A child of a supervisor of its own, which tells how far it is.
  @start """
  start = fn model, options ->
    child = {VLLM, [name: Orphan, model: model, python: #{inspect(@fake)}, nursery: false, shutdown_timeout: 0] ++ options}
    {:ok, supervisor} = Supervisor.start_link([child], strategy: :one_for_one)
    Process.register(supervisor, Orphan.Supervisor)
    IO.puts("loading")
  end
  """

  @serve """
  spawn(fn ->
    for {:ok, _delta} <- VLLM.stream(Orphan, "delta:a;hold"), do: IO.puts("serving")
  end)
  """

  defp now, do: System.monotonic_time(:millisecond)

  # Has an engine load, be idle or serve. Loading goes on by itself, so that a kill may come at
  # any moment of it.
  defp bring_to(beam, moment, model \\ "litter;ready", options \\ "max_restarts: 0") do
    cast(beam, @start <> "start.(#{inspect(model)}, [#{options}])")
    await(beam, "loading")

    if moment != :loading do
      call(beam, ":ok = VLLM.await_ready(Orphan); IO.puts(:idle)")
    end

    if moment == :serving do
      cast(beam, @serve)
      await(beam, "serving")
    end
  end

  describe "a BEAM killed by SIGKILL" do
    test "at random moments leaves nothing" do
      kill_at_random(2)
    end

    # EX_VLLM_TEST_KILLS=50 was for guides/reliability.md.
    @tag :slow
    test "many times at random moments leaves nothing" do
      count = String.to_integer(System.get_env("EX_VLLM_TEST_KILLS", "12"))
      times = kill_at_random(count)

      IO.puts(
        "\n#{count} BEAMs killed: all was gone after #{Enum.max(times)} ms at most, " <>
          "#{Enum.at(Enum.sort(times), div(count, 2))} ms in the middle"
      )
    end

    # Moments and delays come from the seed that ExUnit prints.
    defp kill_at_random(count) do
      plans =
        for _ <- 1..count, do: {Enum.random([:loading, :idle, :serving]), :rand.uniform(150)}

      for {moment, delay} <- plans do
        beam = start()
        bring_to(beam, moment)
        Process.sleep(delay)
        since = now()
        assert signal("KILL", beam.os_pid)
        gone_after(beam, since)
      end
    end
  end

  describe "a BEAM" do
    for {how, code} <- [
          {":init.stop", ":init.stop()"},
          {"System.halt", "System.halt(3)"},
          {"SIGTERM", nil}
        ] do
      if how != ":init.stop", do: @tag(:slow)

      test "that ends by #{how} leaves nothing" do
        beam = start()
        bring_to(beam, :serving)
        since = now()
        if unquote(code), do: cast(beam, unquote(code)), else: signal("TERM", beam.os_pid)
        told(gone_after(beam, since), "a BEAM that ends by #{unquote(how)}")
      end
    end

    test "that ends by Ctrl-C twice in iex leaves nothing" do
      beam = serve_in_iex()
      since = now()
      send_text(beam, <<3>>)
      await_text(beam, "BREAK")
      send_text(beam, <<3>>)
      told(gone_after(beam, since), "Ctrl-C twice in iex")
    end

    @tag :slow
    test "whose terminal is closed leaves nothing" do
      beam = serve_in_iex()
      since = now()
      # The program that holds the other end of the terminal.
      assert signal("KILL", beam.os_pid)
      told(gone_after(beam, since), "a closed terminal")
    end

    defp serve_in_iex do
      beam = start_iex()
      code = Base.encode64(@start <> ~s|start.("litter;ready", []);| <> @serve)

      send_text(
        beam,
        "Logger.configure(level: :none); Application.ensure_all_started(:ex_vllm)\n"
      )

      send_text(beam, ~s|"#{code}" \|> Base.decode64!() \|> Code.eval_string()\n|)
      await_text(beam, "serving")
      beam
    end
  end

  describe "in a BEAM that lives" do
    setup do
      %{beam: start()}
    end

    for {how, code} <- [
          {"a supervisor that is stopped", "Supervisor.stop(Orphan.Supervisor)"},
          {"a supervisor that is killed",
           "Process.exit(Process.whereis(Orphan.Supervisor), :kill)"}
        ] do
      @tag :slow
      test "#{how} leaves nothing", %{beam: beam} do
        # Started from a process of its own: the one that reads must not end with it.
        call(beam, "Process.flag(:trap_exit, true)")
        bring_to(beam, :serving)
        since = now()
        cast(beam, unquote(code))
        told(gone_after(beam, since, :lives), unquote(how))
      end
    end

    for {how, code} <- [
          {"an owner that crashes", "Process.exit(Process.whereis(Owner), :crash)"},
          {"the application stopped", "Application.stop(:ex_vllm)"}
        ] do
      @tag :slow
      test "#{how} leaves nothing", %{beam: beam} do
        cast(beam, """
        spawn(fn ->
          llm = VLLM.llm!("litter;ready", python: #{inspect(@fake)}, nursery: false, shutdown_timeout: 0)
          Process.register(self(), Owner)
          for {:ok, _delta} <- VLLM.stream(llm, "delta:a;hold"), do: IO.puts("serving")
        end)
        """)

        await(beam, "serving")
        since = now()
        cast(beam, unquote(code))
        told(gone_after(beam, since, :lives), unquote(how))
      end
    end

    for {how, model} <- [
          {"is refused", "litter;refuse:out_of_memory"},
          {"ends", "litter;exit:3"},
          {"is killed", "litter;kill"},
          {"breaks the protocol", "litter;garbage"},
          {"hangs", "litter;hang"}
        ] do
      if how != "ends", do: @tag(:slow)

      test "a load that #{how} leaves nothing", %{beam: beam} do
        bring_to(beam, :loading, unquote(model), "max_restarts: 0, load_timeout: 5_000")
        call(beam, "{:error, _} = VLLM.await_ready(Orphan)")
        told(gone_after(beam, now(), :lives), "a load that #{unquote(how)}")
      end
    end

    @tag :slow
    test "a worker that is killed leaves nothing", %{beam: beam} do
      bring_to(beam, :serving)
      since = now()
      assert signal("KILL", worker(beam))
      told(gone_after(beam, since, :lives), "SIGKILL of the worker")
    end

    test "a guard that is killed leaves nothing", %{beam: beam} do
      bring_to(beam, :serving)
      guard = guard(beam)
      since = now()
      assert signal("KILL", guard)
      told(gone_after(beam, since, :lives), "SIGKILL of the guard")
    end

    @tag :slow
    test "a guard that is killed, and the BEAM after it, leave nothing", %{beam: beam} do
      bring_to(beam, :serving)
      guard = guard(beam)
      since = now()
      assert signal("KILL", guard)
      assert signal("KILL", beam.os_pid)
      told(gone_after(beam, since), "SIGKILL of the guard and the BEAM")
    end

    @tag :slow
    test "a guard that is killed after the BEAM leaves nothing", %{beam: beam} do
      bring_to(beam, :serving)
      guard = guard(beam)
      # It is not to be faster.
      assert signal("STOP", guard)
      since = now()
      assert signal("KILL", beam.os_pid)
      assert signal("KILL", guard)
      told(gone_after(beam, since), "SIGKILL of the BEAM and the guard")
    end

    @tag :slow
    test "a worker that is stopped leaves nothing when its engine is", %{beam: beam} do
      bring_to(beam, :serving)
      assert signal("STOP", worker(beam))
      since = now()
      call(beam, "Supervisor.stop(Orphan.Supervisor)")
      told(gone_after(beam, since, :lives), "a stopped worker")
    end
  end

  defp worker(beam), do: VLLM.FakeEngine.worker_pid(guard(beam))

  # The figures of guides/reliability.md.
  defp told(milliseconds, how) do
    if :slow in ExUnit.configuration()[:include] do
      IO.puts("\n#{how}: all was gone after #{milliseconds} ms")
    end
  end
end
