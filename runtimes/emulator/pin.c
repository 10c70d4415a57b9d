/* The interpreter that the kernel starts for the board's programs: QEMU with one fixed processor.
 *
 * Without -cpu QEMU's user mode silently becomes "max", which has every extension there is; and an
 * option in the environment is lost as soon as a program clears it. So both are compiled in:
 * -DQEMU="..." is the emulator's path inside of the board, -DCPU="..." the processor.
 *
 * The kernel calls it with the flag P: this program, the path of the board's program, its argv[0],
 * its arguments. */
#include <unistd.h>

int main(int argc, char **argv, char **envp)
{
    char *words[argc + 8];
    int count = 0;

    if (argc < 3)
        return 126;
    words[count++] = "qemu-aarch64";
    words[count++] = "-cpu";
    words[count++] = CPU;
    words[count++] = "-0";
    words[count++] = argv[2];
    words[count++] = argv[1];
    for (int index = 3; index < argc; index++)
        words[count++] = argv[index];
    words[count] = 0;
    execve(QEMU, words, envp);
    return 126;
}
