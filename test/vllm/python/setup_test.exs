defmodule VLLM.Python.SetupTest do
  use ExUnit.Case, async: true

  import VLLM.OSProcess

  alias VLLM.{Error, FakeInterpreter, Python, SecondBeam}
  alias VLLM.Python.{Setup, Stamp}

  @moduletag :tmp_dir

  setup %{tmp_dir: tmp_dir} do
    %{venv: Path.join([tmp_dir, "envs", "venv"])}
  end

  defp setup_with(context, fake, opts \\ []) do
    python = FakeInterpreter.write!(context.tmp_dir, fake)
    Setup.run([device: :cpu, venv: context.venv, python: python] ++ opts, &send(self(), &1))
  end

  # What pip was asked to install, in order.
  defp installs(context) do
    for "-m pip install " <> arguments <- FakeInterpreter.calls(context.tmp_dir) do
      arguments |> String.split() |> Enum.drop_while(&(&1 != "off")) |> tl() |> Enum.join(" ")
    end
  end

  defp torch, do: "torch==" <> Map.new(Python.pins(:cpu))["torch"]

  defp whole_lock(name), do: "--requirement " <> Python.lock(name)

  # What of a lock is compiled comes before all of it, and past pip's cache.
  defp installed_of("gguf") do
    ggml = "ggml-python==" <> Map.new(Python.pins("gguf"))["ggml-python"]
    ["--no-cache-dir --no-binary ggml-python " <> ggml, whole_lock("gguf")]
  end

  defp installed_of(extra), do: [whole_lock(extra)]

  test "installs torch and then the lock, and says so in the stamp", context do
    assert setup_with(context, []) == {:ok, :installed, context.venv}
    assert installs(context) == [torch(), whole_lock(:cpu)]
    assert Stamp.read(context.venv) == %Stamp{state: :ready, lock: Stamp.hash(Python.lock(:cpu))}
    assert_received {:phase, "Making a virtual environment with Python 3.12.4" <> _}
  end

  test "a disk without room is told before anything is made", context do
    folder = Path.dirname(context.venv)
    File.mkdir_p!(folder)
    File.touch!(Path.join(folder, "disk-is-full"))
    assert {:error, %Error{reason: :vllm_not_installed} = error} = setup_with(context, [])
    assert error.message =~ "needs 6 GiB of disk space, and #{folder} has 0.5 GiB. Free some"
    refute File.exists?(context.venv)
  end

  test "tells every package that pip comes to", context do
    pip = ~S"""
    echo "Collecting anyio==4.16.0 (from -r cpu.txt (line 9))"
    echo "Looking in indexes: https://user:secret@example.org/simple"
    echo "Installing collected packages: anyio"
    """

    assert {:ok, :installed, _} = setup_with(context, pip: pip)
    total = length(Python.pins(:cpu))
    assert_received {:progress, "[1/1] anyio 4.16.0"}
    assert_received {:progress, "unpacking"}
    package = "[1/#{total}] anyio 4.16.0"
    assert_received {:progress, ^package}
    refute_received {:progress, "Looking" <> _}
  end

  test "costs nothing where everything is there", context do
    assert {:ok, :installed, _} = setup_with(context, [])
    before = FakeInterpreter.calls(context.tmp_dir)
    assert setup_with(context, []) == {:ok, :unchanged, context.venv}
    assert FakeInterpreter.calls(context.tmp_dir) == before
  end

  test "adds the tests' packages and all extras to what is there, and keeps them", context do
    assert {:ok, :installed, _} = setup_with(context, [])
    assert {:ok, :installed, _} = setup_with(context, [], test: true)
    extras = Enum.flat_map(Python.extras(), &installed_of/1)
    assert installs(context) == [torch(), whole_lock(:cpu)] ++ extras ++ [whole_lock(:test)]
    assert {:ok, :unchanged, _} = setup_with(context, [])
    assert {:ok, :unchanged, _} = setup_with(context, [], test: true)
  end

  describe "an extra" do
    test "is added without another environment, and a later plain set-up keeps it", context do
      assert {:ok, :installed, _} = setup_with(context, [])
      File.touch!(Path.join(context.venv, "still there"))
      assert {:ok, :installed, _} = setup_with(context, [], with: ["torchao"])
      assert installs(context) == [torch(), whole_lock(:cpu), whole_lock("torchao")]
      assert File.exists?(Path.join(context.venv, "still there"))
      hash = Stamp.hash(Python.lock("torchao"))
      assert Stamp.read(context.venv).extras == %{"torchao" => hash}
      assert {:ok, :unchanged, _} = setup_with(context, [])
      assert {:ok, :unchanged, _} = setup_with(context, [], with: ["torchao"])
      assert Stamp.read(context.venv).extras == %{"torchao" => hash}
      assert {:ok, :installed, _} = setup_with(context, [], with: ["torchao"], repair: true)
      assert List.last(installs(context)) == whole_lock("torchao")
    end

    test "is renewed by a plain set-up when its lock is another one", context do
      assert {:ok, :installed, _} = setup_with(context, [])
      stamp = Stamp.read(context.venv)
      old = %{"torchao" => "of another release", "gone" => "no extra any more"}
      :ok = Stamp.write(context.venv, %{stamp | extras: old})
      assert {:ok, :installed, _} = setup_with(context, [])
      assert installs(context) == [torch(), whole_lock(:cpu), whole_lock("torchao")]

      assert Stamp.read(context.venv).extras == %{
               "torchao" => Stamp.hash(Python.lock("torchao"))
             }
    end

    @tag :slow
    test "survives an environment made anew, and an interruption of that", context do
      assert {:ok, :installed, _} = setup_with(context, [], with: ["bitsandbytes"])
      assert {:error, _} = setup_with(context, [pip: "exit 1"], force: true)
      assert Stamp.read(context.venv).state == :installing
      assert {:ok, :installed, _} = setup_with(context, [])
      assert List.last(installs(context)) == whole_lock("bitsandbytes")
      assert Map.keys(Stamp.read(context.venv).extras) == ["bitsandbytes"]
    end

    test "that cannot be installed leaves the environment as it was", context do
      assert {:ok, :installed, _} = setup_with(context, [])
      stamp = Stamp.read(context.venv)

      pip =
        ~s(case "$*" in *torchao*\) echo "ERROR: [Errno 28] No space left on device"; exit 1 ;; esac)

      # The environment's own interpreter is the program that this writes again.
      assert {:error, %Error{message: message}} =
               setup_with(context, [pip: pip], with: ["torchao"])

      assert message =~ "disk is full"
      assert Stamp.read(context.venv) == stamp
      assert Stamp.ready?(context.venv)
    end

    test "that is compiled here needs a compiler, which is told", context do
      pip =
        ~s(case "$* $CMAKE_ARGS" in *ggml*LLAMAFILE=ON*\) ) <>
          ~s(echo "  No CMAKE_CXX_COMPILER could be found."; exit 1 ;; esac)

      assert {:error, %Error{message: message}} = setup_with(context, [pip: pip], with: ["gguf"])
      assert message =~ "apt-get install g++"
    end

    test "that there is not is refused with the nearest name, before anything is done", context do
      assert {:error, %Error{reason: :invalid_option} = error} =
               setup_with(context, [], with: ["bitsandbyte"])

      assert error.message =~ "Did you mean `bitsandbytes`?"
      assert error.message =~ "torchao"
      assert installs(context) == []
    end
  end

  describe "what quantizes" do
    setup context do
      %{quantize: context.venv <> "-quantize", lock: Stamp.hash(Python.lock(:quantize))}
    end

    # Its installs: torch, what is compiled past pip's cache, all of its lock.
    defp quantizing(context) do
      context |> installs() |> Enum.drop_while(&(not String.contains?(&1, "llama-cpp-python")))
    end

    test "has an environment of its own beside vLLM's", context do
      assert setup_with(context, [], with: ["quantize"]) == {:ok, :installed, context.venv}
      assert Stamp.read(context.venv).extras == %{}
      assert Stamp.read(context.quantize) == %Stamp{state: :ready, lock: context.lock}
      assert [compiled, rest] = quantizing(context)
      assert compiled =~ ~r/^--no-cache-dir .*llama-cpp-python==/
      assert rest =~ "--no-binary gptqmodel"
      assert rest =~ whole_lock(:quantize)
      assert {:ok, :unchanged, _} = setup_with(context, [], with: ["quantize"])
    end

    # Each step of a job is a process that imports it, and not every one may write what it compiles.
    test "has its bytecode from the set-up on, as vLLM's environment has", context do
      assert {:ok, :installed, _} = setup_with(context, [], with: ["quantize"])
      pip = Enum.filter(FakeInterpreter.calls(context.tmp_dir), &(&1 =~ "pip install"))
      assert Enum.any?(pip, &(&1 =~ whole_lock(:quantize)))
      assert Enum.filter(pip, &(&1 =~ "--no-compile")) == []
    end

    @tag :slow
    test "is not set up unless it is asked for, then kept by every set-up", context do
      assert {:ok, :installed, _} = setup_with(context, [])
      refute File.exists?(context.quantize)
      assert {:ok, :installed, _} = setup_with(context, [], with: ["quantize"])
      :ok = Stamp.write(context.quantize, %Stamp{state: :ready, lock: "of another release"})
      assert {:ok, :installed, _} = setup_with(context, [])
      assert Stamp.read(context.quantize).lock == context.lock
    end

    @tag :slow
    test "continues after an interruption, and is told not to be complete until then", context do
      pip = ~s(case "$*" in *quantize.txt*\) exit 1 ;; esac)
      assert {:error, _} = setup_with(context, [pip: pip], with: ["quantize"])
      assert Stamp.read(context.venv).state == :ready
      assert Stamp.read(context.quantize).state == :installing
      assert {:ok, :installed, _} = setup_with(context, [])
      assert Stamp.read(context.quantize).state == :ready
    end

    @tag :slow
    test "is left as it is where only vLLM's environment is made anew", context do
      assert {:ok, :installed, _} = setup_with(context, [], with: ["quantize"])
      File.touch!(Path.join(context.venv, "old"))
      File.touch!(Path.join(context.quantize, "old"))
      assert {:ok, :installed, _} = setup_with(context, [], force: true)
      refute File.exists?(Path.join(context.venv, "old"))
      assert File.exists?(Path.join(context.quantize, "old"))
      assert {:ok, :installed, _} = setup_with(context, [], force: true, with: ["quantize"])
      refute File.exists?(Path.join(context.quantize, "old"))
    end
  end

  test "continues after an interruption in the same environment", context do
    assert {:error, _} = setup_with(context, pip: "exit 1")
    assert Stamp.read(context.venv).state == :installing
    assert setup_with(context, venv: "exit 1") == {:ok, :installed, context.venv}
    assert Stamp.read(context.venv).state == :ready
  end

  test "makes the environment anew when the lock is another one", context do
    assert {:ok, :installed, _} = setup_with(context, [])
    :ok = Stamp.write(context.venv, %Stamp{state: :ready, lock: "of another release"})
    File.touch!(Path.join(context.venv, "left over"))
    assert {:ok, :installed, _} = setup_with(context, [])
    refute File.exists?(Path.join(context.venv, "left over"))
  end

  @tag :slow
  test "makes the environment anew when its interpreter has gone", context do
    assert {:ok, :installed, _} = setup_with(context, [])
    File.rm!(Path.join(context.venv, "bin/python"))
    assert {:ok, :installed, _} = setup_with(context, [])
    assert Stamp.ready?(context.venv)
  end

  test "runs once when two want the same at the same time", context do
    opts = [device: :cpu, venv: context.venv, python: FakeInterpreter.write!(context.tmp_dir)]
    tasks = for _ <- 1..2, do: Task.async(fn -> Setup.run(opts) end)
    results = for {:ok, result, _} <- Task.await_many(tasks, 60_000), do: result
    assert Enum.sort(results) == [:installed, :unchanged]
    assert length(installs(context)) == 2
  end

  describe "a set-up that was killed" do
    # A pip that does not end, and says that it runs.
    defp endless(context), do: ~s(touch "#{context.tmp_dir}/pip runs"; exec sleep 600)

    test "leaves no pip behind", context do
      python = FakeInterpreter.write!(context.tmp_dir, pip: endless(context))
      beam = SecondBeam.start()
      opts = [device: :cpu, venv: context.venv, python: python]
      SecondBeam.cast(beam, "VLLM.Python.Setup.run(#{inspect(opts)})")
      assert eventually(fn -> File.exists?(Path.join(context.tmp_dir, "pip runs")) end, 60_000)
      assert Enum.any?(SecondBeam.processes(beam), &(command(&1) =~ "sleep"))
      signal("KILL", beam.os_pid)
      assert SecondBeam.gone_after(beam, 0)
    end

    test "has lost its guard too: the next one ends what is left", context do
      port =
        Port.open({:spawn_executable, "/bin/sleep"}, [
          :exit_status,
          args: ["600"],
          env: [{'EX_VLLM_SETUP', to_charlist(context.venv)}]
        ])

      assert setup_with(context, []) == {:ok, :installed, context.venv}
      assert_received {^port, {:exit_status, 143}}
    end

    # It is given time to end by itself.
    @tag :slow
    test "has left what ends only when it is killed", context do
      script = ~s(trap "" TERM; echo up; while :; do sleep 600; done)

      port =
        Port.open({:spawn_executable, "/bin/sh"}, [
          :exit_status,
          args: ["-c", script],
          env: [{'EX_VLLM_SETUP', to_charlist(context.venv)}]
        ])

      assert_receive {^port, {:data, 'up\n'}}, 10_000
      assert setup_with(context, []) == {:ok, :installed, context.venv}
      assert_received {^port, {:exit_status, 137}}
    end
  end

  test "leaves alone what it did not make, unless forced to replace an environment", context do
    File.mkdir_p!(context.venv)
    File.touch!(Path.join(context.venv, "pyvenv.cfg"))
    assert {:error, %Error{message: message}} = setup_with(context, [])
    assert message =~ "did not make"
    assert message =~ "--force"
    assert File.ls!(context.venv) == ["pyvenv.cfg"]
    assert {:ok, :installed, _} = setup_with(context, [], force: true)
  end

  test "never touches a folder of other files", context do
    File.mkdir_p!(context.venv)
    File.touch!(Path.join(context.venv, "letter.txt"))
    assert {:error, %Error{message: message}} = setup_with(context, [], force: true)
    assert message =~ "not a virtual environment"
    assert File.ls!(context.venv) == ["letter.txt"]
  end

  describe "torch's CPU build" do
    test "comes from PyTorch's index where pip does not find it elsewhere", context do
      pip = ~s"""
      case "$*" in
        *--extra-index-url*) ;;
        *#{torch()}) echo "ERROR: No matching distribution found for #{torch()}"; exit 1 ;;
      esac
      """

      assert {:ok, :installed, _} = setup_with(context, pip: pip)

      assert installs(context) == [
               torch(),
               "--extra-index-url https://download.pytorch.org/whl/cpu #{torch()}",
               whole_lock(:cpu)
             ]
    end

    test "is not looked for elsewhere when the network is down", context do
      pip = ~s"""
      echo "WARNING: Retrying after connection broken by 'NewConnectionError'"
      echo "ERROR: No matching distribution found for #{torch()}"
      exit 1
      """

      assert {:error, %Error{message: message}} = setup_with(context, pip: pip)
      assert message =~ "cannot be reached"
      assert installs(context) == [torch()]
    end
  end

  describe "a failure is explained:" do
    test "no Python of that name", context do
      opts = [device: :cpu, venv: context.venv, python: "/nowhere/python"]
      assert {:error, %Error{reason: :python_not_found, message: message}} = Setup.run(opts)
      assert message =~ "/nowhere/python"
    end

    test "a Python that vLLM does not run on", context do
      assert {:error, %Error{reason: :python_not_found} = error} =
               setup_with(context, version: "3.8.10")

      assert error.message =~ "found 3.8.10"
      assert error.message =~ Python.requirement(:cpu)
      assert error.message =~ "--python"
      refute File.exists?(context.venv)
    end

    test "a library that the system lacks", context do
      assert {:error, %Error{message: message}} = setup_with(context, libraries: "exit 1")
      assert message =~ "libnuma.so.1"
      assert message =~ "apt-get install libnuma1"
      refute File.exists?(context.venv)
    end

    test "no venv module", context do
      venv =
        ~S(echo "The virtual environment was not created: ensurepip is not available."; exit 1)

      assert {:error, %Error{message: message}} = setup_with(context, venv: venv)
      assert message =~ "apt-get install python3-venv"
    end

    test "a full disk", context do
      pip = ~S(echo "ERROR: [Errno 28] No space left on device"; exit 1)
      assert {:error, %Error{reason: :vllm_not_installed} = error} = setup_with(context, pip: pip)
      assert error.message =~ "disk is full"
    end

    test "a version that is not to be had", context do
      pip = ~S"""
      case "$*" in
        *--requirement*) echo "ERROR: No matching distribution found for idna==3.20"; exit 1 ;;
      esac
      """

      assert {:error, %Error{message: message, details: details}} = setup_with(context, pip: pip)
      assert message =~ "no build of idna==3.20"
      assert details["missing"] == "idna==3.20"
    end

    test "a folder that cannot be written" do
      assert {:error, %Error{message: message}} = Setup.run(device: :cpu, venv: "/proc/vllm/venv")

      assert message =~ "/proc/vllm cannot be written"
    end

    test "the last lines of pip come along, without addresses", context do
      pip = ~S"""
      echo "Looking in indexes: https://user:secret@example.org/simple"
      echo "ERROR: something new"
      exit 3
      """

      assert {:error, %Error{details: %{"output" => output}}} = setup_with(context, pip: pip)
      assert output == ["ERROR: something new", "exit status 3"]
    end
  end
end
